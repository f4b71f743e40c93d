"""The executor against the reference, place by place and as a whole.

Every sub-module of the executor is given the reference's own input, so a wrong one shows where it
is and does not blame those behind it. Then the executor runs on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phireg.executor import Executor, blocks
from phireg.executor.attention import prompt_attention
from phireg.executor.blocks import Attend, Weights
from phireg.executor.model import ObserveInputs
from phireg.reference.load import Reference
from phireg.verification.measure import (
    QUANTIZED_KL,
    QUANTIZED_LOGITS_TOLERANCE,
    QUANTIZED_TOLERANCE,
    TOLERANCES,
    divergence,
    logits_tolerance,
    overall,
    quantized_parts,
    token_errors,
    top1,
)
from phireg.verification.measure_types import LogitsResult, Place, PromptResult
from phireg.verification.prompts import Prompts, prompt_ids


def compare_logits(
    executor: Executor,
    reference: Reference,
    prompts: Prompts,
    progress: Callable[[int], None] | None = None,
    inputs: ObserveInputs | None = None,
) -> LogitsResult:
    """Run both on all prompts.

    Args:
        executor: the checkpoint.
        reference: the source's own model, on the same device in the same dtype.
        prompts: from ``choose_prompts``.
        progress: told how many more layers have been computed: each is compared alone, and once
            more when the executor runs on its own.
        inputs: told what goes into the linears when the executor runs on its own.
    """
    spec = executor.spec
    worst: dict[Place, float] = {}
    hidden = [0.0] * spec.num_layers
    results = []
    masked = 0
    slack = logits_tolerance(executor.dtype, spec.num_layers)
    report = progress or (lambda more: None)
    for prompt in prompts.prompts:
        ids = prompt_ids(spec.vocab_size, prompt.tokens).to(executor.device)
        watcher = _Comparer(executor, ids, worst, report)
        wanted = reference.logits(ids, watcher)[0]
        shown = wanted > torch.finfo(torch.float32).min / 2
        seen = shown.all(dim=0)
        masked = int((~seen).sum())
        watcher.head(wanted[:, seen], seen)
        own: list[float] = []

        def observe(
            layer: int, what: str, x: Tensor, own: list[float] = own, watcher: Any = watcher
        ) -> None:
            if what == "hidden":
                own.append(overall(token_errors(x, watcher.states[layer].to(x.device))))
                report(1)

        got = executor(ids, observe, inputs)[0]
        hidden = [max(pair) for pair in zip(hidden, own, strict=True)]
        got, wanted = got[:, seen], wanted[:, seen]
        results.append(_result(got, wanted, prompt.tokens, prompt.purpose, slack))
    quantized = quantized_parts(spec.quantization)
    return LogitsResult(
        tuple(results),
        tuple((place, worst[place]) for place in _order(spec.num_layers)),
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


def _order(layers: int) -> list[Place]:
    inside: list[Place] = [(n, part) for n in range(layers) for part in ("attention", "mlp")]
    return [(None, "embedding"), *inside, (None, "final norm"), (None, "lm_head")]


def _result(got: Tensor, wanted: Tensor, tokens: int, purpose: str, slack: float) -> PromptResult:
    errors = token_errors(got, wanted)
    scale = float(wanted.square().mean().sqrt())
    same, wrong = top1(got, wanted, slack * scale)
    return PromptResult(
        tokens,
        purpose,
        _finite(float((got - wanted).abs().max())),
        overall(errors),
        divergence(got, wanted),
        same,
        wrong,
        tuple(float(error) for error in errors),
    )


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value


class _Comparer:
    """Holds every part of the executor against what the reference computes, as it computes it."""

    def __init__(
        self,
        executor: Executor,
        ids: Tensor,
        worst: dict[Place, float],
        progress: Callable[[int], None],
    ) -> None:
        self.executor = executor
        self.ids = ids
        self.worst = worst
        self.quantized = quantized_parts(executor.spec.quantization)
        self.progress = progress
        self.states: list[Tensor] = []  # on the CPU: the largest thing kept
        self.ends = executor.end_weights()
        self.after = torch.empty(0)
        self.final = torch.empty(0)
        rope, length = executor.spec.rope, ids.shape[1]
        self.rotary = blocks.rotary_tables(rope, length, length > rope.original, executor.device)

    def embedded(self, x: Tensor) -> None:
        self.note((None, "embedding"), self.executor.embed(self.ends, self.ids), x)

    def layer(self, index: int, before: Tensor, attention: Tensor, mlp: Tensor) -> None:
        executor = self.executor
        shards = executor.layer_weights(index)
        attends = [
            prompt_attention(executor.spec, index, rank, self.ids.shape[1], (), executor.device)
            for rank in executor.ranks
        ]
        seen = self.run(shards, before, attends)
        self.note((index, "attention"), seen["attention"], attention)
        if executor.spec.architecture.residual == "sequential":
            # The MLP's input is the reference's too: its attention is added, ours is silenced.
            silent: list[Attend] = [lambda query, key, value: torch.zeros_like(query)]
            without: list[Weights] = [
                {n: torch.zeros_like(w) if n == "attention.dense.bias" else w for n, w in s.items()}
                for s in shards
            ]
            seen = self.run(without, before + attention, silent * len(shards))
        self.note((index, "mlp"), seen["mlp"], mlp)
        self.progress(1)

    def hidden(self, index: int, after: Tensor) -> None:
        self.after = after
        self.states.append(after.cpu())

    def normed(self, u: Tensor) -> None:
        ours = blocks.norm(self.executor.spec, self.ends[0], "transformer.ln_f", self.after)
        self.note((None, "final norm"), ours, u)
        self.final = u

    def head(self, wanted: Tensor, seen: Tensor) -> None:
        """Compare lm_head, given the reference's normed states."""
        rows = [blocks.linear(weights, "lm_head", self.final) for weights in self.ends]
        spec = self.executor.spec
        ours = torch.cat(rows, dim=-1)[..., : spec.vocab_size].float()
        self.note((None, "lm_head"), (ours / spec.logits_divisor)[..., seen], wanted)

    def run(self, shards: list[Weights], x: Tensor, attends: list[Attend]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        self.executor.run_layer(shards, x, self.rotary, attends, seen.__setitem__)
        return seen

    def note(self, place: Place, got: Tensor, wanted: Tensor) -> None:
        errors = token_errors(got, wanted)
        error = overall(errors) if place[1] in self.quantized else float(errors.max())
        self.worst[place] = max(self.worst.get(place, 0.0), error)
