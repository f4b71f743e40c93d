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

from phireg.executor import Executor, ModelSpec, blocks
from phireg.executor.model import ObserveInputs
from phireg.reference.load import Reference
from phireg.verification.layers import (
    QUANTIZED_KL,
    QUANTIZED_LOGITS_TOLERANCE,
    QUANTIZED_TOLERANCE,
    TOLERANCES,
    Layer,
    divergence,
    logits_tolerance,
    overall,
    quantized_parts,
    token_errors,
    top1,
)
from phireg.verification.result import LogitsResult, Place, PromptResult

CPU_BUDGET = 2e13
"""Multiply-adds a logits check may take on a CPU: some minutes on a few cores."""

GPU_BUDGET = 4e16
"""The same on a GPU."""

_PASSES = 4
"""Forward passes over a prompt: the reference, the executor on its own, and its two halves of every
layer on the reference's states."""

_SHORT = 48


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt length, and its purpose."""

    tokens: int
    purpose: str


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompt lengths of a check."""

    prompts: tuple[Prompt, ...]  # by length
    thresholds: tuple[tuple[int, str], ...]  # tokens above which the behavior changes; the change
    notes: tuple[str, ...]  # on lengths beyond the budget


def choose_prompts(spec: ModelSpec, most: int | None, *, gpu: bool) -> Prompts:
    """Choose prompts long enough to cross every length at which the model's behavior changes.

    One short prompt, and for each threshold one just behind it: far enough for block-sparse layers
    to drop blocks and keep stripes. With long rope also the longest prompt that still takes the
    short factors.
    """
    limit = spec.max_position_embeddings - 1
    candidates = [Prompt(min(_SHORT, limit), "short")]
    thresholds = []
    if (sparse := spec.sparse) is not None:
        window = sparse.block_size * sparse.num_local_blocks
        stripes = window + (sparse.vertical_stride + 1) * sparse.block_size + 3
        if window < limit:
            thresholds.append((window, "block-sparse layers drop blocks"))
            candidates.append(Prompt(min(stripes, limit), f"past {window}: block-sparse"))
    original = spec.rope.original
    if spec.rope.short is not None and original < limit:
        thresholds.append((original, "long rope takes the long factors"))
        candidates.append(Prompt(original, f"{original}: last with short factors"))
        beyond = min(original + 5, limit)
        candidates.append(Prompt(beyond, f"past {original}: long factors"))
    budget = GPU_BUDGET if gpu else CPU_BUDGET
    allowed = int(budget / (_PASSES * _weights(spec))) if most is None else most
    reason = f"the budget of {budget:.0e} multiply-adds" if most is None else "--max-tokens"
    chosen = {p.tokens: p for p in reversed(candidates) if p.tokens <= allowed}
    notes = [
        f"not run, because {reason} allows {allowed} tokens: {p.tokens} tokens ({p.purpose})"
        for p in candidates
        if p.tokens > allowed
    ]
    if notes and allowed not in chosen:
        chosen[allowed] = Prompt(allowed, "as long as allowed")
    ordered = tuple(prompt for _, prompt in sorted(chosen.items()))
    return Prompts(ordered, tuple(sorted(thresholds)), tuple(notes))


def _weights(spec: ModelSpec) -> int:
    """Return the number of multiply-adds for each token, without attention's scores."""
    hidden, size = spec.hidden_size, spec.head_size
    attention = 2 * hidden * size * (spec.num_heads + spec.num_kv_heads)
    mlp = (2 if spec.activation == "gelu_tanh" else 3) * hidden * spec.intermediate_size
    return spec.num_layers * (attention + mlp) + spec.vocab_size * hidden


def prompt_ids(vocab_size: int, tokens: int) -> Tensor:
    """Return token ids, int64 [1, tokens]: the vocabulary in a fixed random order, over and over.

    A prompt then uses as many rows of the embedding as it has tokens.
    """
    generator = torch.Generator().manual_seed(tokens)
    rounds = -(-tokens // vocab_size)
    order = [torch.randperm(vocab_size, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[None, :tokens]


def compare_logits(
    executor: Executor,
    reference: Reference,
    prompts: Prompts,
    progress: Callable[[int], None],
    observe_inputs: ObserveInputs,
) -> LogitsResult:
    """Run both on all prompts; both are on the same device and compute in the same dtype."""
    spec = executor.spec
    errors: dict[Place, float] = {}
    hidden = [0.0] * spec.num_layers
    results = []
    masked = 0
    slack = logits_tolerance(executor.dtype, spec.num_layers)
    for prompt in prompts.prompts:
        ids = prompt_ids(spec.vocab_size, prompt.tokens).to(executor.device)
        comparer = _LayerComparer(executor, ids, errors, progress)
        expected = reference.logits(ids, comparer)[0]
        seen = (expected > torch.finfo(torch.float32).min / 2).all(dim=0)
        masked = int((~seen).sum())
        comparer.lm_head(expected[:, seen], seen)
        actual = executor(ids, comparer.own_run, observe_inputs)[0]
        hidden = list(map(max, hidden, comparer.own_errors))
        results.append(_prompt_result(actual[:, seen], expected[:, seen], prompt, slack))
    quantized = quantized_parts(spec.quantization)
    inside: list[Place] = [(n, p) for n in range(spec.num_layers) for p in ("attention", "mlp")]
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
        max(QUANTIZED_TOLERANCE, TOLERANCES[executor.dtype]) if quantized else None,
        QUANTIZED_KL if quantized else None,
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
        divergence(actual, expected),
        same,
        wrong,
        tuple(errors.tolist()),
    )


class _LayerComparer:
    """Compares every part of the executor with the reference's, as the reference computes it."""

    def __init__(
        self,
        executor: Executor,
        ids: Tensor,
        errors: dict[Place, float],
        progress: Callable[[int], None],
    ) -> None:
        self.executor = executor
        self.ids = ids
        self.errors = errors
        self.progress = progress
        self.quantized = quantized_parts(executor.spec.quantization)
        self.states: list[Tensor] = []  # on the CPU: the largest thing kept
        self.ends = executor.end_weights()
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
        """Compare the hidden states of the executor running on its own."""
        if what == "hidden":
            self.own_errors.append(overall(token_errors(x, self.states[layer].to(x.device))))
            self.progress(1)

    def compare(self, place: Place, actual: Tensor, expected: Tensor) -> None:
        errors = token_errors(actual, expected)
        error = overall(errors) if place[1] in self.quantized else float(errors.max())
        self.errors[place] = max(self.errors.get(place, 0.0), error)
