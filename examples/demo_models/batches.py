"""Examples as token ids, and padded batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from articles import TLDR, Example
from torch import Tensor

SHORT = 64
"""Batches are either wholly within this many tokens (phi3-mini's short rope) or not."""


class Pair(NamedTuple):
    """Token ids of an article up to and including ``TL;DR:``, and of its summary and the end."""

    prompt: list[int]
    summary: list[int]


@dataclass(frozen=True)
class Rows:
    """A batch [B, T], padded on the right."""

    ids: Tensor
    is_summary: Tensor
    is_real: Tensor

    def to(self, device: Any) -> Rows:
        """Copy the batch to a device."""
        return Rows(*(x.to(device) for x in (self.ids, self.is_summary, self.is_real)))


def tokenized(tokenizer: Any, rows: Sequence[Example]) -> list[Pair]:
    """Tokenize prompts and summaries separately, as when a model continues a prompt."""
    encode = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
    prompts = encode([row.article + TLDR for row in rows])["input_ids"]
    ends = encode([row.summary for row in rows])["input_ids"]
    stop = [tokenizer.eos_token_id]
    return [Pair(prompt, end + stop) for prompt, end in zip(prompts, ends, strict=True)]


def padded(pairs: Sequence[Pair]) -> Rows:
    """Make one batch, padded with id 0 behind the text, where causal attention ignores it."""
    width = max(len(pair.prompt) + len(pair.summary) for pair in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    begin, end = torch.zeros(len(pairs), 1), torch.zeros(len(pairs), 1)
    for row, (prompt, summary) in enumerate(pairs):
        begin[row], end[row] = len(prompt), len(prompt) + len(summary)
        ids[row, : len(prompt) + len(summary)] = torch.tensor(prompt + summary)
    place = torch.arange(width)
    return Rows(ids, (place >= begin) & (place < end), place < end)


class Shuffled:
    """All training pairs on the device, and random batches of them.

    Short texts come in batches of their own, as often as there are such texts.
    """

    def __init__(self, pairs: Sequence[Pair], device: str) -> None:
        lengths = [len(pair.prompt) + len(pair.summary) for pair in pairs]
        short = [pair for pair, length in zip(pairs, lengths, strict=True) if length <= SHORT]
        long = [pair for pair, length in zip(pairs, lengths, strict=True) if length > SHORT]
        self.pools = [padded(pool).to(device) for pool in (short, long)]
        self.share = len(short) / len(pairs)

    def batches(self, size: int, seed: int) -> Iterator[Rows]:
        """Yield endless random batches, each as wide as its longest text."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            is_long = float(torch.rand((), generator=generator)) >= self.share
            pool = self.pools[is_long]
            rows = torch.randint(len(pool.ids), (size,), generator=generator)
            rows = rows.to(pool.ids.device)
            real = pool.is_real[rows]
            width = int(real.sum(dim=1).max())
            yield Rows(pool.ids[rows, :width], pool.is_summary[rows, :width], real[:, :width])
