"""The numbers of a quantization report. Immutable data; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phireg.findings import MEASURED, UNMEASURED, Finding, Severity
from phireg.quality.estimates import Estimate

CLOSE, CHANGED, FAR = "close", "changed", "far"
UNCLEAR, UNINFORMATIVE = "unclear", "uninformative"

LIMITS = ((CLOSE, 0.05, 0.90), (CHANGED, 0.5, 0.70))
"""The scale, the same for every format: a class, its largest KL divergence in nats, and its least
share of positions with the same next token. What is beyond the last is ``FAR``."""

WORDS = {
    CLOSE: "close to the unquantized model",
    CHANGED: "noticeably changed from the unquantized model",
    FAR: "far from the unquantized model",
    UNCLEAR: "not enough text to tell",
    UNINFORMATIVE: "this text tells nothing",
}
"""Every verdict in words."""

CACHE_LIMIT = 0.02
"""The relative increase of the perplexity up to which, with 95% confidence, a doubted KV cache is
fine: formats of 8 bits cost less, and what was reported of such a cache is twenty times as much."""

_NONE = "-"
_SHOWN = 100
"""Characters of a prompt."""


def sqnr(relative: float) -> float:
    """Return a relative error as a signal-to-quantization-noise ratio in decibels."""
    if relative == 0:
        return math.inf
    return -20 * math.log10(relative) if relative < math.inf else -math.inf


def decibels(relative: float | None) -> str:
    """Write a relative error as SQNR: ``31.5``; ``exact`` where there is none."""
    if relative is None:
        return _NONE
    ratio = sqnr(relative)
    return f"{ratio:.1f}" if math.isfinite(ratio) else "exact" if ratio > 0 else "lost"


def percent(relative: float | None) -> str:
    """Write a relative error: ``2.65%``; ``exact`` where there is none."""
    if relative is None:
        return _NONE
    return "exact" if relative == 0 else f"{relative:.2%}"


def number(value: float, digits: int = 2) -> str:
    """Write a number that is not negative without exponents: ``66,650``, ``3.52``, ``0.0012``."""
    if not math.isfinite(value):
        return "infinite"
    if value >= 10**digits:
        return f"{value:,.0f}"
    return "<0.0001" if 0 < value < 1e-4 else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """Write a share of many values: ``0``, ``0.002%``, ``12%``."""
    if value is None:
        return _NONE
    if 0 < value < 1e-6:
        return "<0.0001%"
    return "0" if value == 0 else f"{100 * value:.2g}%"


def times(value: float) -> str:
    """Write a ratio: ``2.42x``, ``1,520x``."""
    if not math.isfinite(value):
        return "infinite"
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x"


@dataclass(frozen=True, slots=True)
class LinearQuality:
    """One linear of one layer, over all ranks.

    What is compared are the factors of its product: for SmoothQuant they are the smoothed input
    and the smoothed weight. An error is the root of the sum of squared differences over that of
    the squared unquantized values.
    """

    layer: int
    linear: str
    weight: float  # error
    activation: float | None  # error of the input; None where inputs are not quantized
    saturation: float | None  # share of the input's values beyond the ends of the scale
    outliers: float  # largest channel of the unsmoothed input over the median channel

    @property
    def worst(self) -> float:
        """The larger of the two errors."""
        return max(self.weight, self.activation or 0.0)


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Both models on the report's text."""

    origin: str
    rows: int
    tokens: int
    calibrated: bool  # the scales were calibrated on these samples too
    vocab_size: int
    top1: Estimate  # share of positions with the same most likely next token
    kl: Estimate  # mean KL(unquantized || quantized), in nats
    nll: float  # mean negative log likelihood of the next token, of the quantized model
    unquantized_nll: float
    nll_change: Estimate

    @property
    def description(self) -> str:
        """Origin and size of the text, in a few words."""
        samples = f"{self.rows} sample{'s' if self.rows > 1 else ''}"
        which = "calibrated on as well" if self.calibrated else "not calibrated on"
        return f"{self.origin}: {samples}, {self.tokens:,} tokens, {which}"

    @property
    def perplexity(self) -> float:
        """Of the quantized model."""
        return _exp(self.nll)

    @property
    def unquantized_perplexity(self) -> float:
        """Of the unquantized model."""
        return _exp(self.unquantized_nll)

    @property
    def loss(self) -> Estimate:
        """Relative increase of the perplexity; negative if it is lower."""
        change = self.nll_change
        return Estimate(*(_exp(x) - 1 for x in (change.value, change.low, change.high)))

    @property
    def informative(self) -> bool:
        """The unquantized model predicts the text better than all tokens alike would."""
        return self.unquantized_perplexity < self.vocab_size

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the scale that the intervals leave possible, the best one first."""
        names = [*(name for name, _, _ in LIMITS), FAR]
        ends = [(self.kl.low, self.top1.high), (self.kl.high, self.top1.low)]
        best, worst = (
            next(
                (n for n, (_, kl, top1) in enumerate(LIMITS) if a <= kl and b >= top1), len(LIMITS)
            )
            for a, b in ends
        )
        return tuple(names[best : worst + 1])


@dataclass(frozen=True, slots=True)
class Continuation:
    """What both models write behind the beginning of a text, greedily."""

    prompt: str
    before: str  # by the unquantized model
    after: str
    tokens: int  # of each at most

    @property
    def rows(self) -> tuple[tuple[str, str], ...]:
        """Labels and texts in one line each, of the prompt the end."""
        lines = (" ".join(text.split()) for text in (self.prompt, self.before, self.after))
        prompt, before, after = (line or "nothing" for line in lines)
        if len(prompt) > _SHOWN:
            prompt = f"... {prompt[-_SHOWN:]}"
        return ("behind", prompt), ("before", before), ("after", after)


@dataclass(frozen=True, slots=True)
class Quality:
    """A quantized checkpoint against the unquantized one that ``convert`` would write."""

    checkpoint_dir: str
    family: str
    qformat: str
    kv_cache_dtype: str | None
    architecture: str  # TensorRT-LLM's name
    dtype: str
    tp_size: int
    linears: tuple[LinearQuality, ...]  # in the order of the computation
    hidden: tuple[float, ...]  # by layer, mean over tokens of the error of its output
    text: TextQuality
    unquantized_size: int  # bytes of the rank files that convert would write
    size: int  # bytes of the rank files
    continuation: Continuation | str  # or why there is none
    provenance: tuple[tuple[str, str], ...]  # label and value

    @property
    def verdict(self) -> str:
        """A key of ``WORDS``."""
        if not self.text.informative:
            return UNINFORMATIVE
        classes = self.text.classes
        return classes[0] if len(classes) == 1 else UNCLEAR

    @property
    def summary(self) -> str:
        """The verdict and its reason."""
        text, word = self.text, WORDS[self.verdict]
        if self.verdict == UNINFORMATIVE:
            return (
                f"{word}: the unquantized model's own perplexity on it is "
                f"{number(text.unquantized_perplexity, 4)}, and picking among all "
                f"{text.vocab_size:,} tokens blindly has {text.vocab_size:,}; measure on text like "
                "that of its training (--calib-file)"
            )
        if self.verdict == UNCLEAR:
            word += f", {text.classes[0]} or {text.classes[-1]}"
        top1, kl = text.top1, text.kl
        return (
            f"{word}: the same next token at {top1.value:.1%} of {text.tokens:,} positions "
            f"({_range(top1, '{:.1%}'.format)} with 95% confidence), KL divergence "
            f"{number(kl.value)} nats ({_range(kl, number)}); {self.perplexities}"
        )

    @property
    def perplexities(self) -> str:
        """Both perplexities. A lower one than the unquantized model's is no defect."""
        text, loss = self.text, self.text.loss
        change = f"{loss.value:+.2%}" if math.isfinite(loss.value) else "far more"
        if loss.low <= 0 <= loss.high:
            change += ", within what the text can tell"
        after, before = (number(x, 4) for x in (text.perplexity, text.unquantized_perplexity))
        return f"perplexity {after} instead of {before} ({change})"

    @property
    def name(self) -> str:
        """The name of the checkpoint's directory."""
        return Path(self.checkpoint_dir).name

    @property
    def scheme(self) -> str:
        """Format and cache in a few words."""
        cache = self.kv_cache_dtype
        return self.qformat + (f" with an {cache} KV cache" if cache else "")

    def worst_first(self) -> Sequence[LinearQuality]:
        """Return the linears, that with the largest error of weight or input first."""
        return sorted(self.linears, key=lambda linear: -linear.worst)


def settled(doubt: Finding, quality: Quality | None) -> Finding:
    """Return what was measured of a doubt; it becomes a warning where nothing dispels it."""
    if doubt.code != UNMEASURED:
        return doubt
    if quality is None or not quality.text.informative:
        return replace(doubt, severity=Severity.WARNING)
    loss = quality.text.loss
    change, low, high = (f"{x:+.2%}" for x in (loss.value, loss.low, loss.high))
    detail = f"measured with the weights, perplexity {change} ({low} to {high})"
    if loss.high <= CACHE_LIMIT:
        return Finding(Severity.NOTE, MEASURED, doubt.subject, detail)
    detail += f", so that {CACHE_LIMIT:+.0%} or less is not sure; compare without --kv-cache-dtype"
    return Finding(Severity.WARNING, MEASURED, doubt.subject, detail)


def _range(estimate: Estimate, text: Callable[[float], str]) -> str:
    return f"{text(max(0.0, estimate.low))} to {text(estimate.high)}"


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
