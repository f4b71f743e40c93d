"""The page about a summarization."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from statistics import median
from typing import Any

from phireg.report.page import Axis, Facts, render_template
from phireg.summarization.result import ROUGES, BackendResult, Summarization

MOST_ARTICLES = 100
"""Articles shown with their texts; the worst ones."""

_OPEN = 3
"""Articles whose texts are unfolded although all backends agree."""

_BINS = 20
_PIECE = re.compile(r"[a-z0-9]+|[^a-z0-9]+", re.IGNORECASE)


def render_summarization(summarization: Summarization, facts: Facts = ()) -> str:
    """Return the page as text."""
    articles = list(_worst_articles(summarization))
    return render_template(
        "summary.html",
        summarization=summarization,
        rouges=ROUGES,
        chart=_score_chart(summarization),
        spread=_histograms(summarization.backends),
        articles=articles,
        different=[article for article in articles if len(article["texts"]) > 1],
        provenance=(*summarization.provenance, *facts),
    )


def _score_chart(summarization: Summarization) -> dict[str, Any]:
    """Place every backend's scores, and the thresholds, on one axis."""
    thresholds = {c.threshold for c in summarization.checks if c.metric == "rouge1"}
    limits = sorted(threshold for threshold in thresholds if 0 <= threshold <= 100)
    scores = {name: [r.rouge.total[name] for r in summarization.backends] for name in ROUGES}
    axis = Axis.around([*limits, *(score for row in scores.values() for score in row)], 2)
    return {"axis": axis, "scores": scores, "limits": limits}


def _histograms(backends: Sequence[BackendResult]) -> dict[str, Any]:
    """Count each backend's articles by their ROUGE-1, all on one scale."""
    scores = [[article["rouge1"] for article in r.rouge.articles] for r in backends]
    axis = Axis.around([score for row in scores for score in row], 1, _BINS)
    bins = len(axis.ticks()) - 1
    counts = []
    for row in scores:
        places = [min(int((score - axis.low) / axis.step + 1e-9), bins - 1) for score in row]
        counts.append([places.count(n) for n in range(bins)])
    most = max(map(max, counts))
    return {
        "axis": axis,
        "backends": [
            {
                "name": result.name,
                "median": median(row),
                "lowest": min(row),
                "bins": [
                    {"low": axis.ticks()[n][1], "high": axis.ticks()[n + 1][1], "count": count}
                    | {"height": 100 * count / most}
                    for n, count in enumerate(of_backend)
                ],
            }
            for result, row, of_backend in zip(backends, scores, counts, strict=True)
        ],
    }


@dataclass(frozen=True, slots=True)
class _Piece:
    """A word of a summary, or what is between two."""

    text: str
    unknown: bool = False  # not in the reference
    different: bool = False  # not at this place in the other backends' summary


def _worst_articles(summarization: Summarization) -> Iterator[dict[str, Any]]:
    """Yield articles with the different summaries of each; those with several come first."""

    def lowest(n: int) -> float:
        return min(result.rouge.articles[n]["rouge1"] for result in summarization.backends)

    def agree(n: int) -> bool:
        return len({result.summaries[n].text for result in summarization.backends}) == 1

    worst = sorted(range(len(summarization.samples)), key=lowest)
    opened = worst[:_OPEN]
    for n in sorted(sorted(worst, key=agree)[:MOST_ARTICLES], key=lambda n: (agree(n), lowest(n))):
        sample = summarization.samples[n]
        by_text: dict[str, list[int]] = {}
        for index, result in enumerate(summarization.backends):
            by_text.setdefault(result.summaries[n].text.strip(), []).append(index)
        rows = [_pieces(text, sample.reference) for text in by_text]
        if len(rows) > 1:
            rows = [_marked(rows[0], rows[1]), *(_marked(row, rows[0]) for row in rows[1:])]
        yield {
            "number": n,
            "sample": sample,
            "lowest": lowest(n),
            "opened": len(rows) > 1 or n in opened,
            "texts": [
                {
                    "backends": [(i, summarization.backends[i].name) for i in indices],
                    "rouge1": summarization.backends[indices[0]].rouge.articles[n]["rouge1"],
                    "pieces": pieces,
                }
                for indices, pieces in zip(by_text.values(), rows, strict=True)
            ],
        }


def _pieces(summary: str, reference: str) -> list[_Piece]:
    known = {word.lower() for word in _PIECE.findall(reference)}
    return [
        _Piece(text, unknown=text[0].isalnum() and text.lower() not in known)
        for text in _PIECE.findall(summary)
    ]


def _marked(pieces: list[_Piece], others: list[_Piece]) -> list[_Piece]:
    own, other = ([piece.text for piece in row] for row in (pieces, others))
    marked = list(pieces)
    for tag, start, end, _, _ in SequenceMatcher(None, own, other, autojunk=False).get_opcodes():
        if tag != "equal":
            marked[start:end] = [replace(piece, different=True) for piece in pieces[start:end]]
    return marked
