"""The page about a summarization."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from phireg.report.page import WIDTH, render_template
from phireg.summarization.result import ROUGES, BackendResult, Summarization

MOST_ARTICLES = 100
"""Articles shown with their texts; the worst ones."""

_BIN = 5
_BIN_HEIGHT = 78
_GROUP = (WIDTH - 16 - 40) / len(ROUGES)
_WORD = re.compile(r"[a-z0-9]+", re.IGNORECASE)


def render_summarization(summarization: Summarization) -> str:
    """Return the page as text."""
    return render_template(
        "summary.html",
        summarization=summarization,
        rouges=ROUGES,
        bars=_bar_chart(summarization),
        spread=_histograms(summarization.backends),
        articles=list(_worst_articles(summarization)),
        provenance=summarization.provenance,
    )


@dataclass(frozen=True, slots=True)
class _BarChart:
    """A group of bars for each ROUGE, a bar for each backend."""

    bar_width: float
    thresholds: Sequence[float]
    bars: list[dict[str, Any]] = field(default_factory=list)
    height: int = 260
    left: int = 40
    right: int = WIDTH - 16
    bottom: int = 230
    group_width: float = _GROUP

    def x(self, score: float) -> float:
        return self.left + score / 100 * (self.right - self.left)

    def y(self, score: float) -> float:
        return self.bottom - score / 100 * (self.bottom - 22)


def _bar_chart(summarization: Summarization) -> _BarChart:
    backends = summarization.backends
    thresholds = {c.threshold for c in summarization.checks if c.metric == "rouge1"}
    chart = _BarChart(
        min(64.0, _GROUP * 0.8 / len(backends)),
        sorted(threshold for threshold in thresholds if 0 <= threshold <= 100),
    )
    for group, metric in enumerate(ROUGES):
        margin = (chart.group_width - chart.bar_width * len(backends)) / 2
        start = chart.left + chart.group_width * group + margin
        for index, result in enumerate(backends):
            chart.bars.append(
                {
                    "x": start + chart.bar_width * index,
                    "backend": index,
                    "name": result.name,
                    "metric": metric,
                    "score": result.rouge.total[metric],
                }
            )
    return chart


def _histograms(backends: Sequence[BackendResult]) -> list[dict[str, Any]]:
    """Count each backend's articles by their ROUGE-1, all on one scale."""
    scores = [[article["rouge1"] for article in r.rouge.articles] for r in backends]
    counts = [
        [sum(min(int(s), 99) // _BIN == n for s in of_backend) for n in range(100 // _BIN)]
        for of_backend in scores
    ]
    most = max(map(max, counts))
    return [
        {
            "name": result.name,
            "median": median(of_backend),
            "lowest": min(of_backend),
            "bins": [
                {"low": n * _BIN, "count": count, "height": max(_BIN_HEIGHT * count / most, 1.5)}
                for n, count in enumerate(bins)
                if count
            ],
        }
        for result, of_backend, bins in zip(backends, scores, counts, strict=True)
    ]


def _worst_articles(summarization: Summarization) -> Iterator[dict[str, Any]]:
    def lowest(n: int) -> float:
        return min(result.rouge.articles[n]["rouge1"] for result in summarization.backends)

    for n in sorted(range(len(summarization.samples)), key=lowest)[:MOST_ARTICLES]:
        sample = summarization.samples[n]
        yield {
            "sample": sample,
            "summaries": [
                {
                    "name": result.name,
                    "rouge1": result.rouge.articles[n]["rouge1"],
                    "words": list(_words(result.summaries[n].text.strip(), sample.reference)),
                }
                for result in summarization.backends
            ],
        }


def _words(summary: str, reference: str) -> Iterator[tuple[str, bool]]:
    """Split a summary into pieces; True marks a word that the reference does not have."""
    known = {word.lower() for word in _WORD.findall(reference)}
    end = 0
    for match in _WORD.finditer(summary):
        if match.start() > end:
            yield summary[end : match.start()], False
        yield match.group(), match.group().lower() not in known
        end = match.end()
    if end < len(summary):
        yield summary[end:], False
