"""What the verifiers of checkpoints and of Hugging Face directories share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.checkpoint.manifest import check_weights, read_manifest
from phireg.files.kinds import MANIFEST
from phireg.planning.model import Plan
from phireg.planning.plan import plan
from phireg.planning.report import fold_layers
from phireg.reader.layouts import SIDECAR
from phireg.registry import AUTO
from phireg.source.readings import Readings
from phireg.verification.result import NotNeeded, Outcome, Problem, Progress, own_place

if TYPE_CHECKING:
    from phireg.verification.compute import ComputedChecks


class Verifier(ABC):
    """Makes the checks of one directory, which share its files and the source's plan."""

    plan: Plan
    tp_size = 1

    def __init__(self, path: Path, config: Mapping[str, Any], progress: Progress) -> None:
        self.path = path
        self.config = config
        self.progress = progress
        self.manifest = read_manifest(path)
        self.computed: ComputedChecks | None = None

    def open_computed(self, device: str, dtype: str, max_tokens: int | None) -> None:
        """Prepare the checks that run the model; an unknown device is an error here."""
        from phireg.device import pick_device
        from phireg.verification.compute import ComputedChecks

        self.computed = ComputedChecks(
            self.path, self.config, pick_device(device), dtype, max_tokens, self.progress
        )

    def plan_source(
        self, model_dir: str, family: str, revision: str | None, chosen: Readings
    ) -> None:
        """Plan the source, read as the user chose or as the manifest records."""
        readings = dataclasses.asdict(chosen.over(Readings.recorded(self.manifest)))
        options = {**self.options(), **readings}
        self.plan = plan(model_dir, family=family, revision=revision, **options)
        self.source_arguments = ["--model-dir", model_dir]
        self.source_arguments += ["--family", family] if family != AUTO else []
        self.source_arguments += ["--revision", revision] if revision is not None else []

    def make(self, check: str) -> Outcome:
        """Make one of ``CHECKS``."""
        quick = {"structure": self.structure, "config": self.config_json, "weights": self.weights}
        outcome = quick[check]() if check in quick else self.compute(check)
        if check == "weights" and not outcome.problems:
            outcome = outcome._replace(problems=list(self._digest_problems()))
        return outcome

    def _digest_problems(self) -> Iterator[Problem]:
        """Yield tensors that are not as phireg wrote them, where something is quantized."""
        if not self.manifest or not self.manifest.get("quantization"):
            return
        defects = list(check_weights(self.path, self.manifest))
        if SIDECAR in self.manifest["files"] and not (self.path / SIDECAR).exists():
            defects.append(f"{SIDECAR} is missing")
        for defect in defects:
            file, colon, rest = defect.partition(": ")
            name, _, text = (rest if colon else defect).partition(" ")
            hint = f"{MANIFEST} has its digest: quantize the model again"
            yield Problem(f"{file} {name}" if colon else name, text, hint, *own_place(name))

    def other_model(self, **settings: object) -> list[Problem]:
        """Return one problem where these settings are not the source's: no value compares then."""
        differing = [
            f"{name} is {value} here and {self.plan.config[name]} there"
            for name, value in settings.items()
            if self.plan.config.get(name, value) != value
        ]
        if not differing:
            return []
        text = f"is not of the {self.plan.family} model in {self.plan.model_dir}: "
        record = (self.manifest or {}).get("source")
        made_from = record.get("model_dir") if isinstance(record, Mapping) else None
        hint = f"did you mean {made_from}, which {MANIFEST} names?"
        if made_from in (None, self.plan.model_dir):
            hint = "give --model-dir the model that it was made from."
        return [Problem("config.json", text + ", ".join(differing), hint, part="config")]

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the options of the conversion whose result the directory is compared with."""

    @abstractmethod
    def structure(self) -> Outcome:
        """Check names, shapes, dtypes and keys against the reader's rules."""

    @abstractmethod
    def config_json(self) -> Outcome:
        """Compare config.json with what the source calls for."""

    @abstractmethod
    def weights(self) -> Outcome:
        """Compare every tensor with the source."""

    def compute(self, check: str) -> Outcome:
        """Make a check that runs the model."""
        if check == "ranks" and self.tp_size == 1:
            raise NotNeeded("there is one rank: nothing to merge")
        assert self.computed is not None
        return self.computed.run(check, self.plan)

    @abstractmethod
    def written(self) -> Iterator[tuple[str, str]]:
        """Yield the pairs of ``provenance`` on the directory's content."""

    def provenance(self) -> Iterator[tuple[str, str]]:
        """Yield label and value pairs about files, versions and settings."""
        candidate, source = self.plan.chosen.candidate, self.plan.source
        yield "source", self.plan.model_dir + (f" at {source.revision}" if source.revision else "")
        yield "family", f"{candidate.name} ({candidate.distribution} {candidate.version})"
        block = self.config.get("quantization_config")
        stated = block.get("producer") if isinstance(block, Mapping) else None
        producer = (self.manifest or {}).get("producer") or stated
        if isinstance(producer, Mapping):
            yield "made by", f"{producer.get('name')} {producer.get('version')}"
        else:
            reason = f"{MANIFEST} names no producer" if self.manifest else f"there is no {MANIFEST}"
            yield "made by", f"not known: {reason}"
        yield from self.written()
        yield "verified by", f"phireg {metadata.version('phireg')}"
        if self.computed is not None:
            yield "computed", self.computed.description
        yield "date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def folded(problems: Iterable[Problem]) -> list[Problem]:
    """Fold problems that differ in their layer only; the first of each group is kept."""
    problems = list(problems)
    return [
        dataclasses.replace(problems[indices[0]], where=where)
        for (where, _), indices in fold_layers((p.where, p.text) for p in problems)
    ]
