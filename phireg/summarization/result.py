"""The scores and the result of a summarization.

ROUGE is as the ``evaluate`` library's metric defines it. ``evaluate`` downloads the script of that
metric, which does no more than what is done here with the package it stands on, rouge-score: no
stemming, rouge-score's own words, and the middle of a bootstrap over the articles, whose draws are
seeded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from phireg.summarization.task import Sample, Settings

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True, slots=True)
class Rouge:
    """F-measures for each of ``ROUGES``, from 0 to 100."""

    total: Mapping[str, float]  # the bootstrap's middle
    articles: tuple[Mapping[str, float], ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A backend's summary of one article."""

    text: str  # without special tokens
    new_tokens: int  # without the stop id
    perplexity: float | None = None  # of prompt and summary together; None if not computed


@dataclass(frozen=True, slots=True)
class BackendResult:
    """The result of one backend."""

    name: str
    directory: str
    summaries: tuple[Summary, ...]  # of each article
    rouge: Rouge
    batch_seconds: tuple[float, ...]  # of the generation of each batch, without the warm-up
    memory: int | None  # the peak in bytes; None if unknown

    @property
    def perplexity(self) -> float | None:
        """The mean over articles; None unless it is known for all."""
        known = [s.perplexity for s in self.summaries if s.perplexity is not None]
        return sum(known) / len(known) if len(known) == len(self.summaries) else None

    @property
    def seconds(self) -> float:
        """The seconds of all batches."""
        return sum(self.batch_seconds)

    @property
    def latency(self) -> float:
        """The mean seconds of a batch."""
        return self.seconds / len(self.batch_seconds)

    @property
    def new_tokens(self) -> int:
        """The new tokens of all articles."""
        return sum(summary.new_tokens for summary in self.summaries)

    @property
    def tokens_per_second(self) -> float:
        """The new tokens of all articles by the seconds of all batches."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def metric(self, name: str) -> float | None:
        """Return a score by name: one of ``ROUGES``, or "perplexity"."""
        return self.rouge.total[name] if name in ROUGES else self.perplexity


@dataclass(frozen=True, slots=True)
class Check:
    """A score and its threshold; a score equal to it fails."""

    backend: str
    metric: str  # "rouge1", which must be above the threshold, or "perplexity", below
    value: float | None  # None if the backend does not give it, which fails
    threshold: float

    @property
    def passed(self) -> bool:
        """Compare the score with the threshold; NaN fails."""
        if self.value is None:
            return False
        if self.metric == "perplexity":
            return self.value < self.threshold
        return self.value > self.threshold

    def __str__(self) -> str:
        bound = f"{'below' if self.metric == 'perplexity' else 'above'} {self.threshold:g}"
        if self.value is None:
            return f"{self.backend}: no {self.metric}; it must be {bound}"
        verb = "is" if self.passed else "is not"
        return f"{self.backend}: {self.metric} {self.value:.2f} {verb} {bound}"


@dataclass(frozen=True, slots=True)
class Summarization:
    """A whole run."""

    data: str  # the origin of the articles
    note: str | None  # why substitutes of the public set, if these are
    settings: Settings
    samples: tuple[Sample, ...]
    backends: tuple[BackendResult, ...]
    checks: tuple[Check, ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()  # labels and values: versions, models, data

    @property
    def passed(self) -> bool | None:
        """Tell if no check failed; None if nothing was checked."""
        return all(check.passed for check in self.checks) if self.checks else None

    def agreement(self) -> Mapping[tuple[str, str], int]:
        """Count the equal summaries of each two backends."""
        return {
            (first.name, second.name): sum(
                a.text == b.text for a, b in zip(first.summaries, second.summaries, strict=True)
            )
            for first, second in combinations(self.backends, 2)
        }


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The scores to reach."""

    backends: Collection[str]  # to check, by name
    rouge1: float  # must be exceeded
    perplexity: float | None = None  # must be undercut; None if it is not computed

    def check(self, results: Sequence[BackendResult]) -> tuple[Check, ...]:
        """Compare the backends' scores with the thresholds."""
        limits = {"rouge1": self.rouge1, "perplexity": self.perplexity}
        return tuple(
            Check(result.name, metric, result.metric(metric), limit)
            for result in results
            if result.name in self.backends
            for metric, limit in limits.items()
            if limit is not None
        )


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
    np.random.seed(0)
    try:
        aggregate = aggregator.aggregate()
    finally:
        np.random.set_state(state)
    total = {name: 100 * float(aggregate[name].mid.fmeasure) for name in ROUGES}
    return Rouge(total, tuple(articles))


def perplexity(mean_nll: float) -> float:
    """Return the exponential of a mean of -ln p in nats; may be infinite."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
