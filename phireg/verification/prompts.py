"""Choose prompts that cross every length at which a model's behavior changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phireg.reader.spec import ModelSpec

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
    notes: tuple[str, ...] = ()  # on lengths that the user left out
    undone: tuple[str, ...] = ()  # lengths beyond the budget


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
    if (sliding := spec.sliding_window) is not None and sliding < limit:
        thresholds.append((sliding, "the sliding window hides tokens"))
        candidates.append(Prompt(min(sliding + 5, limit), f"past {sliding}: sliding window"))
    budget = GPU_BUDGET if gpu else CPU_BUDGET
    allowed = int(budget / (_PASSES * _weights(spec))) if most is None else most
    reason = f"the budget of {budget:.0e} multiply-adds" if most is None else "--max-input-len"
    chosen = {p.tokens: p for p in reversed(candidates) if p.tokens <= allowed}
    absent = tuple(
        f"not run, because {reason} allows {allowed} tokens: {p.tokens} tokens ({p.purpose})"
        for p in candidates
        if p.tokens > allowed
    )
    if absent and allowed not in chosen:
        chosen[allowed] = Prompt(allowed, "as long as allowed")
    ordered = tuple(prompt for _, prompt in sorted(chosen.items()))
    notes, undone = (absent, ()) if most is not None else ((), absent)
    return Prompts(ordered, tuple(sorted(thresholds)), notes, undone)


def _weights(spec: ModelSpec) -> int:
    """Return the number of multiply-adds for each token, without attention's scores."""
    hidden, size = spec.hidden_size, spec.head_size
    attention = 2 * hidden * size * (spec.num_heads + spec.num_kv_heads)
    mlp = (2 if spec.activation == "gelu_tanh" else 3) * hidden * spec.intermediate_size
    return spec.num_layers * (attention + mlp) + spec.vocab_size * hidden


def prompt_ids(vocab_size: int, tokens: int) -> Tensor:
    """Return int64 [1, tokens]: the vocabulary in a fixed random order, over and over."""
    generator = torch.Generator().manual_seed(tokens)
    rounds = -(-tokens // vocab_size)
    order = [torch.randperm(vocab_size, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[None, :tokens]
