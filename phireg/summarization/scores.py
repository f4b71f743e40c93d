"""ROUGE as the ``evaluate`` library's metric defines it, and perplexity.

``evaluate`` downloads the script of its metric. That script does no more than what is done here
with the package it stands on, rouge-score: no stemming, rouge-score's own words, and the middle of
a bootstrap over the articles, whose draws are seeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SEED = 0


@dataclass(frozen=True, slots=True)
class Rouge:
    """F-measures for each of ``ROUGES``, from 0 to 100."""

    total: Mapping[str, float]  # the bootstrap's middle
    articles: tuple[Mapping[str, float], ...]


def rouge(summaries: Sequence[str], references: Sequence[str]) -> Rouge:
    """Score summaries, at least one, against their references."""
    import numpy as np
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator

    scorer, aggregator = RougeScorer(list(ROUGES), use_stemmer=False), BootstrapAggregator()
    articles = []
    for summary, reference in zip(summaries, references, strict=True):
        scores = scorer.score(reference, summary)
        aggregator.add_scores(scores)
        articles.append({name: 100 * float(scores[name].fmeasure) for name in ROUGES})
    state = np.random.get_state()
    np.random.seed(_SEED)
    try:
        aggregate = aggregator.aggregate()
    finally:
        np.random.set_state(state)
    total = {name: 100 * float(aggregate[name].mid.fmeasure) for name in ROUGES}
    return Rouge(total, tuple(articles))


def perplexity(mean_nll: float) -> float:
    """The exponential of a mean negative log likelihood in nats; may be infinite."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
