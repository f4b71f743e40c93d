"""Scores of a model: ROUGE of its greedy summaries and perplexity of the references."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from batches import Pair, padded
from torch.nn import functional


def rouge(summary: str, reference: str) -> dict[str, float]:
    """Return F-measures of common words (rouge1) and longest common subsequence (rougeL)."""
    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (summary, reference))
    common = (Counter(ours) & Counter(theirs)).total()
    length = [0] * (len(theirs) + 1)
    for word in ours:
        before = length[:]
        for i, other in enumerate(theirs, 1):
            length[i] = before[i - 1] + 1 if word == other else max(before[i], length[i - 1])
    total = max(1, len(ours) + len(theirs))
    return {"rouge1": 2 * common / total, "rougeL": 2 * length[-1] / total}


def mean_rouge(summaries: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the means of ``rouge`` over all pairs."""
    scores = [rouge(ours, theirs) for ours, theirs in zip(summaries, references, strict=True)]
    return {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}


@torch.no_grad()
def perplexities(model: Any, pairs: Sequence[Pair], batch: int = 32) -> tuple[float, float]:
    """Return the perplexity of summaries (end token included) and of whole texts."""
    loss = [0.0, 0.0]
    count = [0, 0]
    for start in range(0, len(pairs), batch):
        rows = padded(pairs[start : start + batch]).to(model.device)
        logits = model(input_ids=rows.ids, use_cache=False).logits[:, :-1].float()
        each = functional.cross_entropy(logits.mT, rows.ids[:, 1:], reduction="none")
        for i, where in enumerate((rows.is_summary[:, 1:], rows.is_real[:, 1:])):
            loss[i] += float(each[where].sum())
            count[i] += int(where.sum())
    return math.exp(loss[0] / count[0]), math.exp(loss[1] / count[1])


@torch.no_grad()
def summaries(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], batch: int = 32, most: int = 64
) -> list[str]:
    """Continue the prompts greedily, in batches padded on the left."""
    texts: list[str] = []
    end = tokenizer.eos_token_id
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[end] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=most,
            do_sample=False,
        )
        texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts
