"""Two executors side by side through the layers, one layer of each in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phireg.executor import Executor, blocks
from phireg.executor.attention import prompt_attention
from phireg.quality.linears import LinearMeter
from phireg.quality.result import LinearQuality
from phireg.verification.layers import divergence

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
"""Of every layer, in the order of the computation."""


@dataclass(frozen=True, slots=True)
class Walked:
    """What was measured; see ``phireg.quality.result``."""

    linears: tuple[LinearQuality, ...]
    hidden: tuple[float, ...]
    top1: float
    kl: float
    nll: float
    unquantized_nll: float


def walk(
    plain: Executor,
    quantized: Executor,
    rows: Sequence[Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> Walked:
    """Run both on all rows, layer by layer.

    Both must compute in float32, on the same device. Between layers only the hidden states of all
    rows are in memory; at the end also the logits of one of the two.

    Args:
        plain: the unquantized model, made with ``offload``.
        quantized: the quantized one, likewise.
        rows: token ids of each row, two or more.
        progress: told how many more layers are done.
    """
    report = progress or (lambda more: None)
    with torch.no_grad():
        ids = [torch.tensor([list(row)], device=plain.device) for row in rows]
        states = list(zip(_embedded(plain, ids), _embedded(quantized, ids), strict=True))
        linears: list[LinearQuality] = []
        hidden = []
        for layer in range(plain.spec.num_layers):
            states, found = _layer(plain, quantized, layer, states)
            linears += found
            errors = [_token_errors(ours, wanted) for wanted, ours in states]
            hidden.append(float(torch.cat(errors).mean()))
            report(1)
        wanted = _logits(plain, [before for before, _ in states])
        got = _logits(quantized, [after for _, after in states])
        return _compared(tuple(linears), tuple(hidden), ids, list(wanted), got)


def _embedded(executor: Executor, ids: Sequence[Tensor]) -> list[Tensor]:
    ends = executor.end_weights()
    return [executor.embed(ends, row) for row in ids]


def _layer(
    plain: Executor, quantized: Executor, layer: int, states: list[tuple[Tensor, Tensor]]
) -> tuple[list[tuple[Tensor, Tensor]], list[LinearQuality]]:
    """All rows through one layer of both."""
    before, after = plain.layer_weights(layer), quantized.layer_weights(layer)
    meters = {linear: LinearMeter(linear, before, after) for linear in LINEARS}
    made = []
    for wanted, ours in states:
        length, rope = wanted.shape[1], plain.spec.rope
        rotary = blocks.rotary_tables(rope, length, length > rope.original, plain.device)
        attends = [
            prompt_attention(plain.spec, layer, rank, length, (), plain.device)
            for rank in plain.ranks
        ]
        made.append(
            (
                plain.run_layer(
                    before,
                    wanted,
                    rotary,
                    attends,
                    observe_inputs=lambda linear, parts: meters[linear].see(parts),
                ),
                quantized.run_layer(after, ours, rotary, attends),
            )
        )
    return made, [meter.result(layer) for meter in meters.values()]


def _token_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """Every token's error relative to itself, float32 [tokens].

    Some models have a few tokens whose states are a thousand times as large as all others; taken
    together with them the others would not count.
    """
    norm = wanted[0].norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (got - wanted)[0].norm(dim=-1) / norm


def _logits(executor: Executor, states: Sequence[Tensor]) -> Iterator[Tensor]:
    """Of every row [tokens, vocab_size]; the head is in memory meanwhile."""
    ends = executor.end_weights()
    for x in states:
        yield executor.logits(ends, x)[0]


def _compared(
    linears: tuple[LinearQuality, ...],
    hidden: tuple[float, ...],
    ids: Sequence[Tensor],
    wanted: Sequence[Tensor],
    got: Iterator[Tensor],
) -> Walked:
    positions = predicted = same = 0
    kl = nll = unquantized = 0.0
    for row, before, after in zip(ids, wanted, got, strict=True):
        positions += len(before)
        predicted += len(before) - 1
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        kl += divergence(after, before) * len(before)
        unquantized += _nll(before, row[0])
        nll += _nll(after, row[0])
    return Walked(
        linears,
        hidden,
        same / positions,
        kl / positions,
        nll / predicted,
        unquantized / predicted,
    )


def _nll(logits: Tensor, ids: Tensor) -> float:
    """Negative log likelihood of every token but the first, summed up."""
    chosen = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return float(chosen.sum(dtype=torch.float64))
