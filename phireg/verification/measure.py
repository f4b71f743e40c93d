"""How far two tensors are apart, and how far they may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phireg.reader.schemes import Quantization

_ROWS = 256

TOLERANCES = {torch.float32: 1e-4, torch.float16: 16 * 2.0**-10, torch.bfloat16: 16 * 2.0**-7}
"""Relative error of one sub-module's output on one token, by compute dtype.

In float32 a sum of K products is off by about sqrt(K) units of 6e-8, 7e-6 for the largest K of the
family (17920); a factor of 14 is left for softmax, which magnifies what it gets. In the 16-bit
dtypes every intermediate result is rounded, and the comparison is only as sharp as 16 of their
units: float32 is the default for that reason.
"""

QUANTIZED_TOLERANCE = 0.35
"""Relative error of all tokens of a prompt together of an attention or MLP that is quantized.

FP8 rounds weights and inputs by up to 6 %; INT8 by what a tensor's largest value makes of a step.
Sound checkpoints have shown up to 0.18 (trained models) and 0.24 (random ones with sharp
attention); parts that are permuted, exchanged or rotated wrongly are off by 0.5 to 1.5.
"""

QUANTIZED_LOGITS_TOLERANCE = 1.0
"""Relative error of logits and hidden states of a quantized checkpoint that runs on its own: not
farther from the source than nothing at all. Sound ones have shown up to 0.19 (trained models) and
0.75 (random ones, which magnify differences from layer to layer)."""

QUANTIZED_KL = 1.0
"""Mean KL in nats; sound ones have shown up to 0.24 (trained models) and 0.32 (random ones)."""


def quantized_parts(quantization: Quantization) -> tuple[str, ...]:
    """The parts of a layer that compute with quantized values."""
    if quantization.weights is not None:
        return ("attention", "mlp")
    return ("attention",) if quantization.kv_cache is not None else ()


def logits_tolerance(dtype: torch.dtype, layers: int) -> float:
    """Relative error after ``layers`` layers whose errors are independent."""
    return TOLERANCES[dtype] * math.sqrt(max(1, layers))


def token_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """Every token's error, relative to the root mean square of all tokens; float32 [tokens].

    Relative to the token itself, one whose outputs cancel would count too much. What is not finite
    counts as infinitely far.
    """
    got, wanted = (t.detach().float().flatten(0, -2) for t in (got, wanted))
    scale = wanted.norm(dim=-1).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return ((got - wanted).norm(dim=-1) / scale).nan_to_num(math.inf, math.inf)


def overall(errors: Tensor) -> float:
    """Root mean square of ``token_errors``: the relative error of all tokens together."""
    return float(errors.square().mean().sqrt())


def divergence(got: Tensor, wanted: Tensor) -> float:
    """Mean over positions of KL(wanted || got) in nats, for logits [positions, vocabulary]."""
    total = 0.0
    for start in range(0, len(wanted), _ROWS):
        left, right = (t[start : start + _ROWS].double().log_softmax(-1) for t in (wanted, got))
        total += float((left.exp() * (left - right)).sum())
    return max(0.0, total / len(wanted)) if math.isfinite(total) else math.inf


def top1(got: Tensor, wanted: Tensor, slack: float) -> tuple[float, int]:
    """Share of positions with the same most likely token, and at how many it is another one.

    A token that the reference finds no more than twice ``slack`` worse than its best is the same.
    """
    chosen = wanted.gather(-1, got.argmax(-1, keepdim=True))[:, 0]
    wrong = int((wanted.amax(-1) - chosen > 2 * slack).sum())
    return 1.0 - wrong / len(wanted), wrong
