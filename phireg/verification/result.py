"""The result of a verification. Immutable data; no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from phireg.errors import shortened
from phireg.findings import MOST_FINDINGS, first

_MOST_NOTES = 50

CHECKS = {
    "structure": "names, shapes and dtypes against the reader's rules",
    "config": "config.json against what the source calls for",
    "weights": "every byte against the source",
    "reading": "files, head and settings against what transformers' loader reads",
    "logits": "the executor against the source's own model",
    "ranks": "the ranks in lockstep against the ranks merged",
}
"""The checks, weakest to strongest, and what each compares."""

ENGINE_CHECKS = {
    "files": "the engine's files and its checkpoint's against what was built",
    "network": "what TensorRT was told to compute against the executor, on the CPU",
    "running": "the engine on its GPU against the executor there",
}
"""The checks of an engine that phireg built."""

ENDPOINT_CHECKS = {
    "prompts": "log probabilities of a short prompt",
    "long rope": "prompts on both sides of the switch of long rope's factors",
    "neighbors": "a prompt before that switch, alone and in a batch with one past it",
    "block-sparse": "a prompt past the block-sparse window",
    "sliding window": "a prompt past the sliding window",
    "generation": "a greedy continuation",
    "chat": "the chat template, and the ids that end an answer",
}
"""The checks of a server, against the model it serves."""

QUICK = ("structure", "config", "weights")
"""The checks that run nothing."""

Progress = Callable[[str, int, int], None]
"""Takes a check, how much more of it is done, and its total; called from worker threads, too."""

Place = tuple[int | None, str]
"""Layer (None outside the layers) and part, such as ``(3, "attention")``."""

_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")


def place_of(name: str) -> Place:
    """Return the layer and part that a tensor belongs to; a norm belongs to what it feeds."""
    match = _LAYER.match(name)
    if match:
        attention = match[2].startswith(("attention", "input_layernorm"))
        return int(match[1]), "attention" if attention else "mlp"
    if name.startswith("lm_head"):
        return None, "lm_head"
    return None, "embedding" if "embedding" in name else "final norm"


def own_place(name: str) -> tuple[int | None, str]:
    """Return the layer and part of a tensor by its Hugging Face name."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 4 or not parts[2].isdigit():
        return place_of(name)
    inside = parts[3] in ("self_attn", "input_layernorm")
    return int(parts[2]), "attention" if inside else "mlp"


def place_text(place: Place) -> str:
    """Write a place as ``layer 3 attention``, or as the part alone."""
    layer, part = place
    return part if layer is None else f"layer {layer} {part}"


def error_text(error: float) -> str:
    """Write an error for people: plain where it is large, else by its power of ten."""
    if error == 0:
        return "0 (exact)"
    return f"{error:.3g}" if error >= 0.01 else f"{error:.1e}"


def tolerance_text(tolerance: float) -> str:
    """Write a tolerance for people."""
    return f"{tolerance:.0e}" if tolerance < 0.01 else f"{tolerance:.2g}"


def shown(value: Any, expected: Any) -> str:
    """Write a value; of a long list its first items, or the first that is not as expected."""
    if not isinstance(value, list) or len(value) <= 6:
        return repr(value)
    if isinstance(expected, list) and len(expected) == len(value):
        pairs = enumerate(zip(value, expected, strict=True))
        first = next(index for index, (item, other) in pairs if item != other)
        return f"{value[first]!r} at item {first} (expected {expected[first]!r})"
    return f"[{', '.join(map(repr, value[:3]))}, ...] ({len(value)} items)"


class Skipped(Exception):  # noqa: N818 - not an error
    """Raised by a check that cannot be made; the text says why."""


class NotNeeded(Skipped):
    """Raised by a check that has nothing to compare."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    where: str  # file and tensor, config key, or layer and sub-module
    text: str
    hint: str | None = None
    layer: int | None = None  # from 0
    part: str | None = None  # embedding, attention, mlp, final norm, lm_head or config

    def __post_init__(self) -> None:
        for name in ("where", "text"):
            object.__setattr__(self, name, shortened(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class Outcome(NamedTuple):
    """What a check found."""

    summary: str
    problems: list[Problem]
    notes: list[str]
    undone: tuple[str, ...] = ()  # parts of the check that could not be made, with the reason
    shortened: bool = False  # parts of it were left out as the user asked; the notes say which


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check, whose name is a key of ``CHECKS`` or ``ENGINE_CHECKS``."""

    name: str
    verdict: str  # passed, failed, incomplete, skipped or not needed
    summary: str  # for a check that was not made, the reason
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()  # limits of the check and harmless differences
    seconds: float = 0.0
    undone: tuple[str, ...] = ()  # parts that could not be made, with the reason
    shortened: bool = False  # the user left parts out; the notes say which


def make_check(name: str, make: Callable[[], Outcome]) -> Check:
    """Make one check; what prevents it becomes its outcome."""
    started = time.monotonic()
    outcome = Outcome("", [], [])
    try:
        outcome = make()
        verdict = "failed" if outcome.problems else "incomplete" if outcome.undone else "passed"
    except Skipped as reason:
        verdict = "not needed" if isinstance(reason, NotNeeded) else "skipped"
        outcome = Outcome(str(reason), [], [])
    seconds = time.monotonic() - started
    problems, notes = outcome.problems[:MOST_FINDINGS], first(outcome.notes, _MOST_NOTES)
    if (more := len(outcome.problems) - MOST_FINDINGS) > 0:
        problems.append(Problem(name, f"{more} more problems"))
    return Check(
        name,
        verdict,
        outcome.summary,
        tuple(problems),
        tuple(notes),
        seconds,
        outcome.undone,
        outcome.shortened,
    )


@dataclass(frozen=True, slots=True)
class PromptResult:
    """The logits of one prompt."""

    tokens: int
    purpose: str
    max_abs: float  # largest absolute difference of any logit
    relative: float  # root mean square of the differences over that of the reference's logits
    kl: float  # mean over positions of KL(reference || executor), in nats
    top1: float  # share of positions with the same most likely token, within the tolerance
    top1_wrong: int  # the number of the other positions
    by_position: tuple[float, ...]  # relative errors


@dataclass(frozen=True, slots=True)
class LogitsResult:
    """The executor against the reference.

    ``places`` has the relative error of every part, in the order of the computation, when it is
    given the reference's own input: of the worst token of all prompts, and of quantized parts of
    all tokens of the worst prompt together. ``hidden`` has that of every layer's output when the
    executor runs on its own, of the worst prompt.
    """

    prompts: tuple[PromptResult, ...]  # by length
    places: tuple[tuple[Place, float], ...]
    hidden: tuple[float, ...]
    tolerance: float  # of places, apart from those of quantized parts
    logits_tolerance: float  # of the prompts' relative error and of hidden
    thresholds: tuple[tuple[int, str], ...]  # tokens at which the behavior changes, and the change
    masked: int  # vocabulary ids whose logits the source suppresses and the reader does not
    device: str
    dtype: str  # compute dtype
    quantized: tuple[str, ...] = ()  # parts of every layer that compute with quantized values
    quantized_tolerance: float | None = None  # of the places of quantized parts
    kl_tolerance: float | None = None  # of the prompts, where something is quantized

    @property
    def wrong_places(self) -> tuple[Place, ...]:
        """Places whose error is above their tolerance, in the order of the computation."""
        return tuple(place for place, error in self.places if not error <= self.tolerance_of(place))

    def tolerance_of(self, place: Place) -> float:
        """Return the tolerance of a place's error."""
        if place[1] in self.quantized and self.quantized_tolerance is not None:
            return self.quantized_tolerance
        return self.tolerance

    def is_wrong(self, prompt: PromptResult) -> bool:
        """Return whether logits are too far off; where quantized, the top token may differ."""
        if not prompt.relative <= self.logits_tolerance:
            return True
        if self.kl_tolerance is not None:
            return not prompt.kl <= self.kl_tolerance
        return prompt.top1_wrong > 0


@dataclass(frozen=True, slots=True)
class Verification:
    """All checks of one checkpoint or engine, in the order of ``known``."""

    checkpoint_dir: str
    model_dir: str
    family: str
    config: Mapping[str, Any]  # the checkpoint's config.json
    checks: tuple[Check, ...]
    logits: LogitsResult | None = None
    provenance: tuple[tuple[str, str], ...] = ()  # label and value
    known: tuple[str, ...] = tuple(CHECKS)

    @property
    def verdict(self) -> str:
        """Return what the checks amount to.

        ``failed``: there is a difference. ``incomplete``: there is none, but a check that was asked
        for could not be made, or not as a whole. ``verified``: every check was made and passed.
        ``verified in part``: every check that was asked for.
        """
        verdicts = {check.verdict for check in self.checks}
        if "failed" in verdicts:
            return "failed"
        if verdicts & {"incomplete", "skipped"} or "passed" not in verdicts:
            return "incomplete"
        return "verified in part" if self.unasked else "verified"

    @property
    def passed(self) -> bool:
        """Every check that was asked for was made, and passed."""
        return self.verdict in ("verified", "verified in part")

    @property
    def unasked(self) -> tuple[str, ...]:
        """Checks that were not asked for, or not as a whole."""
        asked = {check.name for check in self.checks if not check.shortened}
        return tuple(name for name in self.known if name not in asked)

    @property
    def unmade(self) -> tuple[str, ...]:
        """Checks that could not be made, or not as a whole."""
        return tuple(c.name for c in self.checks if c.verdict in ("incomplete", "skipped"))

    def check(self, name: str) -> Check:
        """Return the check of that name; KeyError if it was not requested."""
        return {check.name: check for check in self.checks}[name]
