"""A family's tiny model, its plans and its conversions, for the conformance tests.

Besides random values there is a probe checkpoint: every element is its own address, so a moved row
tells its origin.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

import phireg
from phireg.checkpoint.rankfiles import RankFile
from phireg.config.fields import Translation
from phireg.config.hf import HFConfig
from phireg.errors import PlanError, SourceError
from phireg.family import Family
from phireg.planning.build import build_plan
from phireg.planning.model import Options, Plan
from phireg.planning.report import problems
from phireg.registry import GROUP, Candidate, FamilyChoice
from phireg.source.model import Source
from phireg.source.readings import open_source
from phireg.testing.sources import tiny_config, write_tiny_model

Addresses = npt.NDArray[np.uint32]
"""Addresses of source elements, in the shape of a tensor; 0 is padding."""


class Origin(NamedTuple):
    """A source element: its tensor (empty for padding), row and column."""

    tensor: str
    row: int  # the element, for a tensor with one axis
    column: int  # 0 for a tensor with one axis

    def __str__(self) -> str:
        return f"row {self.row} of {self.tensor}" if self.tensor else "the padding"


class AddressBook:
    """Addresses, from 1 on, of the elements of all source tensors (one or two axes)."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self._starts = np.cumsum([1, *sizes])
        self._first = dict(zip(self.shapes, self._starts.tolist(), strict=False))
        self.end = int(self._starts[-1])
        if self.end > 2**32:
            raise SourceError("the model is too large to probe: it has 2^32 elements or more")

    def tensor(self, name: str) -> Addresses:
        """Return the addresses of a tensor, in its shape."""
        shape, first = self.shapes[name], self._first[name]
        return np.arange(first, first + np.prod(shape), dtype=np.uint32).reshape(shape)

    def origin(self, address: int) -> Origin:
        """Return the element at an address."""
        if not address:
            return Origin("", 0, 0)
        name = list(self.shapes)[int(np.searchsorted(self._starts, address, side="right")) - 1]
        width = self.shapes[name][1] if len(self.shapes[name]) > 1 else 1
        row, column = divmod(int(address) - self._first[name], width)
        return Origin(name, row, column)

    def write(self, directory: Path) -> None:
        """Write ``model.safetensors``: float32 tensors whose bits are the addresses."""
        tensors = {name: self.tensor(name).view(np.float32) for name in self.shapes}
        save_file(tensors, directory / "model.safetensors")

    def difference(self, name: str, actual: Addresses, expected: Addresses) -> str | None:
        """Describe the first wrong row (or column) of a tensor; None if all are right."""
        actual, expected = rows_of(actual), rows_of(expected)
        if actual.shape != expected.shape:
            return f"{name} is {list(actual.shape)}, expected {list(expected.shape)}"
        wrong = actual != expected
        if not wrong.any():
            return None
        row = int(wrong.any(axis=1).argmax())
        column = int(wrong[row].argmax())
        origin, right = (self.origin(int(array[row, column])) for array in (actual, expected))
        if origin.tensor and (origin.tensor, origin.row) == (right.tensor, right.row):
            columns = int(wrong.any(axis=0).sum())
            return (
                f"column {column} of {name} came from column {origin.column} of {origin.tensor}, "
                f"expected column {right.column} ({columns} of {actual.shape[1]} columns are wrong)"
            )
        short = f"row {right.row}" if origin.tensor == right.tensor else str(right)
        rows = int(wrong.any(axis=1).sum())
        return (
            f"row {row} of {name} came from {origin}, expected {short} "
            f"({rows} of {len(actual)} rows are wrong)"
        )


def rows_of(array: Addresses) -> Addresses:
    """View a tensor as rows: stacked linears follow each other, a vector has rows of one."""
    return array.reshape(-1, array.shape[-1] if array.ndim > 1 else 1)


def read_addresses(path: Path) -> dict[str, Addresses]:
    """Read the addresses in a rank file of a converted probe checkpoint."""
    with RankFile(path) as file:
        return {
            name: file.read(name).view(np.uint32).reshape(entry.shape)
            for name, entry in file.header.entries.items()
        }


class _SharedConfig(HFConfig):
    """A config whose translation records the keys it reads here, not in a copy."""

    def fresh(self) -> HFConfig:
        return self


class TinyModel:
    """A tiny model of a family (without entry point); plans and files are made on first use."""

    def __init__(self, family: Family, config: Mapping[str, Any], directory: Path) -> None:
        self.family = family
        self.config = tiny_config(family, config)
        self.directory = directory
        self._plans: dict[tuple[int, str | None], Plan] = {}
        self._probes: dict[int, list[dict[str, Addresses]]] = {}

    def translate(self) -> tuple[Translation, tuple[str, ...]]:
        """Translate the config; return also the source keys that no entry reads."""
        config = _SharedConfig(self.config)
        translation = self.family.config_fields().translate(config)
        return translation, config.unread()

    @cached_property
    def source_dir(self) -> Path:
        """The model with random values, float32."""
        return write_tiny_model(self.family, self.config, self.directory / "source")

    @cached_property
    def source(self) -> Source:
        """The tensors of the random model, from headers."""
        return open_source(self.source_dir)

    @cached_property
    def book(self) -> AddressBook:
        """The addresses of the source's elements."""
        return AddressBook({name: t.shape for name, t in self.source.tensors.items()})

    @cached_property
    def probe_dir(self) -> Path:
        """The model with every element's address for its value."""
        directory = self.directory / "probe"
        directory.mkdir()
        self.book.write(directory)
        shutil.copyfile(self.source_dir / "config.json", directory / "config.json")
        return directory

    @cached_property
    def base(self) -> TinyModel | None:
        """The same source converted by the family's base; None for a family without one."""
        if self.family.base is None:
            return None
        directory = self.directory / "base"
        directory.mkdir()
        base = TinyModel(self.family.base, self.config, directory)
        base.source_dir, base.probe_dir = self.source_dir, self.probe_dir
        return base

    @cached_property
    def places(self) -> dict[str, str]:
        """File and line of the rule of each target module."""
        translation, _ = self.translate()
        rules = self.family.weight_rules(translation.fields, HFConfig(self.config))
        return {target: rule.where for target, rule in rules.items()}

    def place(self, tensor: str) -> str:
        """Return file and line of the rule that makes a checkpoint tensor."""
        return self.places[tensor.rpartition(".")[0]]

    def plan(self, tp_size: int, qformat: str | None = None) -> Plan:
        """Return the plan of the random model."""
        key = tp_size, qformat
        if key not in self._plans:
            self._plans[key] = self.plan_for(self.source, tp_size, qformat)
        return self._plans[key]

    def plan_for(self, source: Source, tp_size: int, qformat: str | None = None) -> Plan:
        """Plan the conversion of a source with the same config.json."""
        entry = metadata.EntryPoint(self.family.name, "under:test", GROUP)
        candidate = Candidate(self.family.name, "under test", "0", entry.value, entry)
        options = Options("float32", tp_size, qformat)
        choice = FamilyChoice(self.family, candidate)
        return build_plan(choice, HFConfig(self.config), source, options)

    def plan_problems(self, tp_size: int, qformat: str | None = None) -> str | None:
        """Return the plan's errors as text; None if there are none."""
        errors = self.plan(tp_size, qformat).errors
        if not errors:
            return None
        size = f"TP {tp_size}{f', {qformat}' if qformat else ''}"
        return f"the plan of '{self.family.name}' at {size} has errors:\n{problems(errors)}"

    def probes(self, tp_size: int) -> list[dict[str, Addresses]]:
        """Convert the probe; return the addresses in every tensor of each rank."""
        if tp_size not in self._probes:
            directory = self.convert(self.probe_dir, tp_size)
            files = (directory / f"rank{rank}.safetensors" for rank in range(tp_size))
            self._probes[tp_size] = [read_addresses(file) for file in files]
        return self._probes[tp_size]

    def convert(self, source_dir: Path, tp_size: int) -> Path:
        """Convert a source with the same config.json to float32; return the checkpoint."""
        output = self.directory / f"{source_dir.name}-tp{tp_size}"
        if not output.exists():
            plan = self.plan_for(open_source(source_dir), tp_size)
            if plan.errors:
                raise PlanError(problems(plan.errors))
            phireg.convert(plan, output)
        return output

    def differences_from_base(self, tensors: Iterable[str]) -> list[str]:
        """List the tensors, among these, and the config fields that the base makes differently."""
        if self.base is None or self.base.plan_problems(1):
            return []
        probes, base_probes = self.probes(1)[0], self.base.probes(1)[0]
        lines = []
        for name in tensors:
            if name in probes and name in base_probes:
                difference = self.book.difference(name, probes[name], base_probes[name])
                lines += [f"{difference}  [{self.place(name)}]"] if difference else []
        config, base_config = self.plan(1).config, self.base.plan(1).config
        table = self.family.config_fields()
        for key in {**config, **base_config}:
            if config.get(key) != base_config.get(key):
                places = "".join(f"  [{entry.where}]" for entry in table.producing(key))
                lines.append(
                    f"{key} is {config.get(key)!r}, expected {base_config.get(key)!r}{places}"
                )
        return lines
