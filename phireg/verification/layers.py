"""Run single layers of an executor, and measure how far two tensors are apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from phireg.executor import Executor, blocks
from phireg.executor.attention import prompt_attention
from phireg.executor.blocks import Attend, Weights
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


class Layer:
    """One layer of an executor, whose weights are in memory as long as it is."""

    def __init__(self, executor: Executor, index: int) -> None:
        self.weights = executor.layer_weights(index)
        self._executor = executor
        self._index = index

    def run(
        self,
        x: Tensor,
        observe: Callable[[str, Tensor], None] | None = None,
        observe_inputs: Callable[[str, list[Tensor]], None] | None = None,
    ) -> Tensor:
        """Compute the layer's output for hidden states [batch, tokens, hidden_size]."""
        executor = self._executor
        attends = [
            prompt_attention(executor.spec, self._index, rank, x.shape[1], (), executor.device)
            for rank in executor.ranks
        ]
        return self._run(self.weights, x, attends, observe, observe_inputs)

    def parts(self, before: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """Compute the outputs of attention and MLP, each given the reference's input."""
        outputs: dict[str, Tensor] = {}
        self.run(before, outputs.__setitem__)
        if self._executor.spec.architecture.residual == "parallel":
            return outputs
        # The reference's attention is added to the MLP's input; the executor's is silenced.
        silent: list[Attend] = [lambda query, key, value: torch.zeros_like(query)]
        without_bias: list[Weights] = [
            {n: torch.zeros_like(w) if n == "attention.dense.bias" else w for n, w in rank.items()}
            for rank in self.weights
        ]
        of_mlp: dict[str, Tensor] = {}
        ranks = len(self.weights)
        self._run(without_bias, before + attention, silent * ranks, of_mlp.__setitem__, None)
        return {"attention": outputs["attention"], "mlp": of_mlp["mlp"]}

    def _run(
        self,
        weights: list[Weights],
        x: Tensor,
        attends: list[Attend],
        observe: Callable[[str, Tensor], None] | None,
        observe_inputs: Callable[[str, list[Tensor]], None] | None,
    ) -> Tensor:
        executor, length = self._executor, x.shape[1]
        rope = executor.spec.rope
        rotary = blocks.rotary_tables(rope, length, length > rope.original, executor.device)
        return executor.run_layer(weights, x, rotary, attends, observe, observe_inputs)


def quantized_parts(quantization: Quantization) -> tuple[str, ...]:
    """Return the parts of a layer that compute with quantized values."""
    if quantization.weights is not None:
        return ("attention", "mlp")
    return ("attention",) if quantization.kv_cache is not None else ()


def logits_tolerance(dtype: torch.dtype, layers: int) -> float:
    """Return the relative error after ``layers`` layers whose errors are independent."""
    return TOLERANCES[dtype] * math.sqrt(max(1, layers))


def token_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Compute every token's error, relative to the root mean square of all; float32 [tokens].

    Relative to the token itself, one whose outputs cancel would count too much. Values that are not
    finite count as infinitely far.
    """
    actual, expected = (t.detach().float().flatten(0, -2) for t in (actual, expected))
    scale = expected.norm(dim=-1).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual - expected).norm(dim=-1) / scale).nan_to_num(math.inf, math.inf)


def overall(errors: Tensor) -> float:
    """Return the root mean square of ``token_errors``: the relative error of all tokens."""
    return float(errors.square().mean().sqrt())


def divergence(actual: Tensor, expected: Tensor) -> float:
    """Compute the mean KL(expected || actual) in nats of logits [positions, vocabulary]."""
    total = 0.0
    for start in range(0, len(expected), _ROWS):
        left, right = (
            t[start : start + _ROWS].double().log_softmax(-1) for t in (expected, actual)
        )
        total += float((left.exp() * (left - right)).sum())
    return max(0.0, total / len(expected)) if math.isfinite(total) else math.inf


def top1(actual: Tensor, expected: Tensor, slack: float) -> tuple[float, int]:
    """Return the share of positions with the same most likely token, and the number of others.

    A token that the reference finds no more than twice ``slack`` worse than its best is the same.
    """
    chosen = expected.gather(-1, actual.argmax(-1, keepdim=True))[:, 0]
    wrong = int((expected.amax(-1) - chosen > 2 * slack).sum())
    return 1.0 - wrong / len(expected), wrong
