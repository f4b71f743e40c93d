"""What a verification found. Immutable data; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phireg.verification.measure_types import LogitsResult

CHECKS = {
    "structure": "names, shapes and dtypes against the reader's rules",
    "config": "config.json against what the source calls for",
    "weights": "every byte against the source",
    "logits": "the executor against the source's own model",
    "ranks": "the ranks in lockstep against the ranks merged",
}
"""The checks, weakest to strongest, and what each compares."""

ONE_RANK = "there is one rank: nothing to merge"

QUICK = ("structure", "config", "weights")
"""The checks that run nothing."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        where: file and tensor, config key, or layer and sub-module.
        text: what is wrong with it and what it looks like.
        hint: what may mend it, if that is known.
        layer: the layer concerned, counted from 0.
        part: ``embedding``, ``attention``, ``mlp``, ``final norm``, ``lm_head`` or ``config``.
    """

    where: str
    text: str
    hint: str | None = None
    layer: int | None = None
    part: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: a key of :data:`CHECKS`.
        verdict: ``passed``, ``failed`` or ``skipped``.
        summary: one line; for a skipped check, the reason.
        problems: what is wrong, most telling first.
        notes: what should be known all the same, such as what was not covered.
        seconds: time it took.
    """

    name: str
    verdict: str
    summary: str
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Verification:
    """All checks of one checkpoint.

    Attributes:
        checkpoint_dir: the checkpoint.
        model_dir: the source it was compared with.
        family: name of the family that planned the source.
        config: the checkpoint's config.json.
        checks: in the order of :data:`CHECKS`; those not asked for are left out.
        logits: the numbers of the logits check, if it ran.
        provenance: label and value pairs about versions, files and how it was run.
    """

    checkpoint_dir: str
    model_dir: str
    family: str
    config: Mapping[str, Any]
    checks: tuple[Check, ...]
    logits: LogitsResult | None = None
    provenance: tuple[tuple[str, str], ...] = field(default=())

    @property
    def passed(self) -> bool:
        """No check failed and one passed at least."""
        verdicts = {check.verdict for check in self.checks}
        return "failed" not in verdicts and "passed" in verdicts

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Checks that were skipped or not asked for; merging a single rank is not missed."""
        made = {c.name for c in self.checks if c.verdict != "skipped" or c.summary == ONE_RANK}
        return tuple(name for name in CHECKS if name not in made)

    def check(self, name: str) -> Check:
        """The check of that name.

        Raises:
            KeyError: it was not asked for.
        """
        return {check.name: check for check in self.checks}[name]
