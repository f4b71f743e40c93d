"""Prompts long enough to cross every length at which the model changes its behaviour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phireg.executor import ModelSpec

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
    """A length to try.

    Attributes:
        tokens: how many.
        purpose: what it is for.
    """

    tokens: int
    purpose: str


@dataclass(frozen=True, slots=True)
class Prompts:
    """The lengths to try.

    Attributes:
        prompts: by length.
        thresholds: tokens above which something changes, with what changes.
        notes: what the budget cut off.
    """

    prompts: tuple[Prompt, ...]
    thresholds: tuple[tuple[int, str], ...]
    notes: tuple[str, ...]


def choose_prompts(spec: ModelSpec, most: int | None, *, gpu: bool) -> Prompts:
    """Choose lengths from the config.

    One short prompt, and for each threshold one just behind it: far enough for block-sparse layers
    to drop blocks and keep stripes. With long rope also the longest prompt that still takes the
    short factors.

    Args:
        spec: the checkpoint's.
        most: tokens a prompt may have; None for what the budget allows.
        gpu: whether it runs on one.
    """
    limit = spec.max_position_embeddings - 1
    wanted = [Prompt(min(_SHORT, limit), "short")]
    thresholds = []
    if (sparse := spec.sparse) is not None:
        window = sparse.block_size * sparse.num_local_blocks
        stripes = window + (sparse.vertical_stride + 1) * sparse.block_size + 3
        if window < limit:
            thresholds.append((window, "block-sparse layers drop blocks"))
            wanted.append(Prompt(min(stripes, limit), f"past {window}: block-sparse"))
    original = spec.rope.original
    if spec.rope.short is not None and original < limit:
        thresholds.append((original, "long rope takes the long factors"))
        wanted.append(Prompt(original, f"{original}: last with short factors"))
        beyond = min(original + 5, limit)
        wanted.append(Prompt(beyond, f"past {original}: long factors"))
    allowed = _affordable(spec, gpu) if most is None else most
    kept: dict[int, Prompt] = {}
    cut = []
    for prompt in wanted:
        if prompt.tokens <= allowed:
            kept.setdefault(prompt.tokens, prompt)
        else:
            cut.append(prompt)
    why = (
        "--max-tokens"
        if most is not None
        else f"the budget of {GPU_BUDGET if gpu else CPU_BUDGET:.0e} multiply-adds"
    )
    notes = [
        f"not run, because {why} allows {allowed} tokens: {p.tokens} tokens ({p.purpose})"
        for p in cut
    ]
    if cut and allowed not in kept:
        kept[allowed] = Prompt(allowed, "as long as allowed")
    ordered = tuple(sorted(kept.values(), key=lambda prompt: prompt.tokens))
    return Prompts(ordered, tuple(sorted(thresholds)), tuple(notes))


def prompt_ids(vocab_size: int, tokens: int) -> Tensor:
    """Token ids, int64 [1, tokens]: the vocabulary in a fixed random order, over and over.

    So a prompt touches as many rows of the embedding as it has tokens.
    """
    generator = torch.Generator().manual_seed(tokens)
    rounds = -(-tokens // vocab_size)
    order = [torch.randperm(vocab_size, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[None, :tokens]


def _affordable(spec: ModelSpec, gpu: bool) -> int:
    hidden, size = spec.hidden_size, spec.head_size
    attention = 2 * hidden * size * (spec.num_heads + spec.num_kv_heads)
    mlp = (2 if spec.activation == "gelu_tanh" else 3) * hidden * spec.intermediate_size
    weights = spec.num_layers * (attention + mlp) + spec.vocab_size * hidden
    return int((GPU_BUDGET if gpu else CPU_BUDGET) / (_PASSES * weights))
