"""Compare the executor with the reference: every sub-module alone, and the logits as a whole.

Every sub-module of the executor is given the reference's own input, so a wrong one shows where it
is and does not blame those behind it. Then the executor runs on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phireg.executor import Executor, blocks
from phireg.executor.attention import prompt_attention
from phireg.executor.blocks import Attend, Weights
from phireg.executor.model import ObserveInputs
from phireg.reader.schemes import Quantization
from phireg.reference.load import Reference
from phireg.verification.prompts import Prompt, Prompts, prompt_ids
from phireg.verification.result import (
    LogitsResult,
    Outcome,
    Place,
    Problem,
    PromptResult,
    place_text,
)

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

FOUR_BITS_TOLERANCE = 0.6
"""The same where weights have four bits; sound ones (random, sharp attention) have shown 0.51. It
cannot tell all that is wrong from that: the weights are compared value by value for it."""

QUANTIZED_LOGITS_TOLERANCE = 1.0
"""Relative error of logits and hidden states of a quantized checkpoint that runs on its own: not
farther from the source than nothing at all. Sound ones have shown up to 0.19 (trained models) and
0.75 (random ones, which magnify differences from layer to layer)."""

QUANTIZED_KL = 1.0
"""Mean KL in nats; sound ones have shown up to 0.24 (trained models) and 0.32 (random ones)."""

FOUR_BITS_KL = 2.0
"""The same where weights have four bits; sound ones have shown up to 1.13 (NVFP4, a demo model)."""


class ReferenceNotFiniteError(Exception):
    """The model to compare with gives NaN or infinite values, so that there is no verdict."""

    def __init__(self, place: Place, position: int, tokens: int) -> None:
        super().__init__(place, position, tokens)
        self.place, self.position, self.tokens = place, position, tokens

    def outcome(self, what: str, hint: str) -> Outcome:
        """Return what a check found that meets such values."""
        text = (
            f"{what} is not finite (a prompt of {self.tokens} tokens, position {self.position}): "
            "nothing can be compared from here on"
        )
        problem = Problem(place_text(self.place), text, hint, *self.place)
        return Outcome("the values are not finite", [problem], [])


def check_reference(place: Place, values: Tensor) -> None:
    """Refuse the output [1, tokens, ...] of a part of the reference that is not finite."""
    wrong = ~values.flatten(0, -2).isfinite().all(dim=-1)
    if bool(wrong.any()):
        raise ReferenceNotFiniteError(place, int(wrong.nonzero()[0]), len(wrong))


# The comparison


def compare_logits(
    executor: Executor,
    reference: Reference,
    prompts: Prompts,
    progress: Callable[[int], None],
    observe_inputs: ObserveInputs,
    *,
    quantized_head: bool = False,
) -> LogitsResult:
    """Run both on all prompts; both are on the same device and compute in the same dtype."""
    spec = executor.spec
    quantized = quantized_parts(spec.quantization) + (("lm_head",) if quantized_head else ())
    errors: dict[Place, float] = {}
    hidden = [0.0] * spec.num_layers
    results = []
    masked = 0
    slack = logits_tolerance(executor.dtype, spec.num_layers)
    for prompt in prompts.prompts:
        ids = prompt_ids(spec.vocab_size, prompt.tokens).to(executor.device)
        comparer = _LayerComparer(executor, ids, errors, progress, quantized)
        expected = reference.logits(ids, comparer)[0]
        seen = ~(expected <= torch.finfo(torch.float32).min / 2).any(dim=0)
        masked = int((~seen).sum())
        comparer.lm_head(expected[:, seen], seen)
        actual = executor(ids, comparer.own_run, observe_inputs)[0]
        hidden = list(map(max, hidden, comparer.own_errors))
        results.append(_prompt_result(actual[:, seen], expected[:, seen], prompt, slack))
    inside: list[Place] = [(n, p) for n in range(spec.num_layers) for p in ("attention", "mlp")]
    four_bits = spec.quantization.bits == 4
    tolerance = FOUR_BITS_TOLERANCE if four_bits else QUANTIZED_TOLERANCE
    kl = FOUR_BITS_KL if four_bits else QUANTIZED_KL
    places = [(None, "embedding"), *inside, (None, "final norm"), (None, "lm_head")]
    return LogitsResult(
        tuple(results),
        tuple((place, errors[place]) for place in places),
        tuple(hidden),
        TOLERANCES[executor.dtype],
        QUANTIZED_LOGITS_TOLERANCE if quantized else slack,
        prompts.thresholds,
        masked,
        str(executor.device),
        str(executor.dtype).removeprefix("torch."),
        quantized,
        max(tolerance, TOLERANCES[executor.dtype]) if quantized else None,
        kl if quantized else None,
    )


def _prompt_result(actual: Tensor, expected: Tensor, prompt: Prompt, slack: float) -> PromptResult:
    errors = token_errors(actual, expected)
    scale = float(expected.square().mean().sqrt())
    same, wrong = top1(actual, expected, slack * scale)
    largest = float((actual - expected).abs().max())
    return PromptResult(
        prompt.tokens,
        prompt.purpose,
        math.inf if math.isnan(largest) else largest,
        overall(errors),
        float(divergences(actual, expected).mean()),
        same,
        wrong,
        tuple(errors.tolist()),
    )


@dataclass(eq=False)
class _LayerComparer:
    """Compares every part of the executor with the reference's, as the reference computes it."""

    executor: Executor
    ids: Tensor
    errors: dict[Place, float]
    progress: Callable[[int], None]
    quantized: tuple[str, ...]

    def __post_init__(self) -> None:
        self.states: list[Tensor] = []  # on the CPU: the largest thing kept
        self.ends = self.executor.end_weights()
        self.own_errors: list[float] = []
        self.after = self.final = torch.empty(0)

    def embedded(self, x: Tensor) -> None:
        self.compare((None, "embedding"), self.executor.embed(self.ends, self.ids), x)

    def layer(self, index: int, before: Tensor, attention: Tensor, mlp: Tensor) -> None:
        outputs = Layer(self.executor, index).parts(before, attention)
        self.compare((index, "attention"), outputs["attention"], attention)
        self.compare((index, "mlp"), outputs["mlp"], mlp)
        self.progress(1)

    def hidden(self, index: int, after: Tensor) -> None:
        check_reference((index, "mlp"), after)
        self.after = after
        self.states.append(after.cpu())

    def normed(self, u: Tensor) -> None:
        norm = blocks.norm(self.executor.spec, self.ends[0], "transformer.ln_f", self.after)
        self.compare((None, "final norm"), norm, u)
        self.final = u

    def lm_head(self, expected: Tensor, seen: Tensor) -> None:
        """Compare lm_head, given the reference's normed states; ``seen`` masks the vocabulary."""
        parts = [blocks.linear(weights, "lm_head", self.final) for weights in self.ends]
        logits = self.executor.whole_logits(parts)
        self.compare((None, "lm_head"), logits[..., seen], expected)

    def own_run(self, layer: int, what: str, x: Tensor) -> None:
        if what == "hidden":
            self.own_errors.append(overall(token_errors(x, self.states[layer].to(x.device))))
            self.progress(1)

    def compare(self, place: Place, actual: Tensor, expected: Tensor) -> None:
        check_reference(place, expected)
        errors = token_errors(actual, expected)
        error = overall(errors) if place[1] in self.quantized else float(errors.max())
        self.errors[place] = max(self.errors.get(place, 0.0), error)


# Single layers, and how far two tensors are apart


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


def divergences(actual: Tensor, expected: Tensor) -> Tensor:
    """Compute every position's KL(expected || actual) in nats of logits [positions, vocabulary]."""
    positions = []
    for start in range(0, len(expected), _ROWS):
        left, right = (
            t[start : start + _ROWS].double().log_softmax(-1) for t in (expected, actual)
        )
        positions.append((left.exp() * (left - right)).sum(-1))
    return torch.cat(positions).nan_to_num(math.inf, math.inf).clamp_min(0)


def top1(actual: Tensor, expected: Tensor, slack: float) -> tuple[float, int]:
    """Return the share of positions with a top token that is as good, and how many have none."""
    chosen = expected.gather(-1, actual.argmax(-1, keepdim=True))[:, 0]
    wrong = int((expected.amax(-1) - chosen > 2 * slack).sum())
    return 1.0 - wrong / len(expected), wrong
