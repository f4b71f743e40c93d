"""The numbers of a quantization report. Immutable data; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ALLOWED = {"fp8": 0.02, "int8_sq": 0.05, "int8_wo": 0.02, "int4_wo": 0.05}
"""Largest relative change of the perplexity, by format, of a model that is called close."""

_NONE = "-"


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
    """Write a relative error: ``2.65%``."""
    return _NONE if relative is None else f"{relative:.2%}"


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
    top1: float  # share of positions with the same most likely next token
    kl: float  # mean KL(unquantized || quantized), in nats
    nll: float  # mean negative log likelihood of the next token, of the quantized model
    unquantized_nll: float

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
    def loss(self) -> float:
        """Relative increase of the perplexity; negative if it is lower."""
        return _exp(self.nll - self.unquantized_nll) - 1


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
    provenance: tuple[tuple[str, str], ...]  # label and value

    @property
    def close(self) -> bool:
        """The perplexity is as near to the unquantized one as ``ALLOWED`` says."""
        return abs(self.text.loss) <= ALLOWED[self.qformat]

    @property
    def verdict(self) -> str:
        """One sentence."""
        text = self.text
        change = f"{text.loss:+.2%}" if math.isfinite(text.loss) else "far off"
        word = "close to" if self.close else "not close to"
        return (
            f"{word} the unquantized model: perplexity {text.perplexity:.4g} instead of "
            f"{text.unquantized_perplexity:.4g} ({change}; up to "
            f"{ALLOWED[self.qformat]:.0%} is called close), the same next token at "
            f"{text.top1:.1%} of {text.tokens:,} positions"
        )

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


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
