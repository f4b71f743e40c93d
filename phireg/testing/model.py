"""A family's tiny model, and everything a conformance test makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import phireg
from phireg.config.fields import Translation
from phireg.config.hf import HFConfig
from phireg.errors import PlanError
from phireg.family import Family
from phireg.planning.build import build_plan
from phireg.planning.model import Options
from phireg.planning.report import problems
from phireg.registry import GROUP, Candidate, FamilyChoice
from phireg.source.source import Source, open_source
from phireg.testing.places import Places
from phireg.testing.probe import AddressBook, Addresses, read_addresses
from phireg.testing.tiny import tiny_config, write_tiny_model


class _Recording(HFConfig):
    """A config that can be asked, after a translation, what nobody read."""

    def fresh(self) -> HFConfig:
        return self


class TinyModel:
    """A tiny model of a family; what is made of it is made when it is first asked for.

    Args:
        family: the family; no entry point is looked for.
        config: the tiny source config.json.
        directory: where to write; must exist.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], directory: Path) -> None:
        self.family = family
        self.config = tiny_config(family, config)
        self.directory = directory
        self.places = Places(family, self.config)
        self._made: dict[tuple[Any, ...], Any] = {}

    def translated(self) -> tuple[Translation, tuple[str, ...]]:
        """The translated config, and the source keys that nobody read."""
        recording = _Recording(self.config)
        translation = self.family.config_fields().translate(recording)
        return translation, recording.unread()

    @cached_property
    def source_dir(self) -> Path:
        """The model with random values, float32."""
        return write_tiny_model(self.family, self.config, self.directory / "source")

    @cached_property
    def source(self) -> Source:
        """Its tensors, from headers."""
        return open_source(self.source_dir)

    @cached_property
    def book(self) -> AddressBook:
        """The addresses of its elements."""
        return AddressBook({name: t.shape for name, t in self.source.tensors.items()})

    @cached_property
    def probe_dir(self) -> Path:
        """The model with addresses for values."""
        directory = self.directory / "probe"
        directory.mkdir()
        self.book.write(directory)
        shutil.copyfile(self.source_dir / "config.json", directory / "config.json")
        return directory

    def planned(
        self, tp_size: int, source: Source | None = None, *, qformat: str | None = None
    ) -> phireg.Plan:
        """The plan of the model, or of another source with the same config.json."""
        if source is None:
            key = ("planned", tp_size, qformat)
            if key not in self._made:
                self._made[key] = self.planned(tp_size, self.source, qformat=qformat)
            made: phireg.Plan = self._made[key]
            return made
        options = Options("float32", tp_size, qformat)
        entry = metadata.EntryPoint(self.family.name, "under:test", GROUP)
        candidate = Candidate(self.family.name, "under test", "0", entry.value, entry)
        chosen = FamilyChoice(self.family, candidate)
        return build_plan(chosen, HFConfig(self.config), source, options)

    def plan_problems(self, tp_size: int, qformat: str | None = None) -> str | None:
        """What speaks against the plan, with the places concerned; None if nothing does."""
        errors = self.planned(tp_size, qformat=qformat).errors
        if not errors:
            return None
        text = problems(errors)
        return (
            f"the plan of '{self.family.name}' at TP {tp_size}{f', {qformat},' if qformat else ''} "
            f"has {len(errors)} problems:\n{text}"
            f"\nconcerned:\n{self.places.concerned(text)}"
        )

    def checkpoint(self, tp_size: int) -> Path:
        """The converted model, float32.

        Raises:
            PlanError: it has no plan.
        """
        return self.convert(self.source_dir, tp_size)

    def probes(self, tp_size: int) -> list[dict[str, Addresses]]:
        """The converted probe: for each rank, every tensor's addresses.

        Raises:
            PlanError: it has no plan.
        """
        key = ("probes", tp_size)
        if key not in self._made:
            directory = self.convert(self.probe_dir, tp_size)
            files = (directory / f"rank{rank}.safetensors" for rank in range(tp_size))
            self._made[key] = [read_addresses(file) for file in files]
        ranks: list[dict[str, Addresses]] = self._made[key]
        return ranks

    def convert(self, source_dir: Path, tp_size: int) -> Path:
        """The converted checkpoint of a source with the same config.json, float32.

        Raises:
            PlanError: it has no plan.
        """
        output = self.directory / f"{source_dir.name}-tp{tp_size}"
        if not output.exists():
            plan = self.planned(tp_size, open_source(source_dir))
            if plan.errors:
                raise PlanError(self.plan_problems(tp_size) or "")
            phireg.convert(plan, output)
        return output
