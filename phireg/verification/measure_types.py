"""The numbers of a logits comparison. Immutable data; no torch."""

from __future__ import annotations

from dataclasses import dataclass

Place = tuple[int | None, str]
"""Layer (None outside the layers) and part, such as ``(3, "attention")``."""


def place_text(place: Place) -> str:
    """``layer 3 attention``, or the part alone."""
    layer, part = place
    return part if layer is None else f"layer {layer} {part}"


def shown(error: float) -> str:
    """An error for people: plain where it is large, else by its power of ten."""
    return f"{error:.3g}" if error >= 0.01 else f"{error:.1e}"


def limit(tolerance: float) -> str:
    """A tolerance for people."""
    return f"{tolerance:.0e}" if tolerance < 0.01 else f"{tolerance:.2g}"


@dataclass(frozen=True, slots=True)
class PromptResult:
    """One prompt.

    Attributes:
        tokens: its length.
        purpose: why this length.
        max_abs: largest absolute difference of any logit.
        relative: root mean square of the differences over that of the reference's logits.
        kl: mean over positions of KL(reference || executor), in nats.
        top1: share of positions at which both have the same most likely token, or two that the
            tolerance does not tell apart.
        top1_wrong: the number of the other positions.
        by_position: relative error at every position.
    """

    tokens: int
    purpose: str
    max_abs: float
    relative: float
    kl: float
    top1: float
    top1_wrong: int
    by_position: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LogitsResult:
    """The executor against the reference.

    Attributes:
        prompts: by length.
        places: for every place in the order of the computation, the relative error of its output
            on the worst token of all prompts when it is given the reference's own input.
        hidden: for every layer, the relative error of the hidden states behind it when the
            executor runs on its own, of the worst prompt.
        tolerance: what ``places`` may reach, apart from those of quantized parts.
        logits_tolerance: what the prompts' relative error and ``hidden`` may reach.
        thresholds: tokens at which the model's behaviour changes, with what changes.
        masked: vocabulary ids whose logits the source suppresses and the reader does not.
        device: where it ran.
        dtype: compute dtype.
        quantized: parts of every layer that compute with quantized values. Their errors in
            ``places`` are of all tokens of the worst prompt together.
        quantized_tolerance: what these may reach.
        kl_tolerance: what the prompts' KL may reach, where something is quantized.
    """

    prompts: tuple[PromptResult, ...]
    places: tuple[tuple[Place, float], ...]
    hidden: tuple[float, ...]
    tolerance: float
    logits_tolerance: float
    thresholds: tuple[tuple[int, str], ...]
    masked: int
    device: str
    dtype: str
    quantized: tuple[str, ...] = ()
    quantized_tolerance: float | None = None
    kl_tolerance: float | None = None

    @property
    def wrong_places(self) -> tuple[Place, ...]:
        """Places whose error is above their tolerance, in the order of the computation."""
        return tuple(place for place, error in self.places if not error <= self.tolerance_of(place))

    def tolerance_of(self, place: Place) -> float:
        """What a place's error may reach."""
        if place[1] in self.quantized and self.quantized_tolerance is not None:
            return self.quantized_tolerance
        return self.tolerance

    def is_wrong(self, prompt: PromptResult) -> bool:
        """Whether a prompt's logits are too far off.

        Where something is quantized, the most likely token may be another one.
        """
        if not prompt.relative <= self.logits_tolerance:
            return True
        if self.kl_tolerance is not None:
            return not prompt.kl <= self.kl_tolerance
        return prompt.top1_wrong > 0
