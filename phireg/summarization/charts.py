"""The pictures of the report: scores by backend, and how they spread over the articles."""

from __future__ import annotations

from collections.abc import Sequence

from phireg.report.svg import WIDTH, element, picture, text
from phireg.summarization.result import BackendResult, Check
from phireg.summarization.scores import ROUGES

COLOURS = 4
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 16.0, 22.0, 30.0
_BINS = 20


def score_chart(backends: Sequence[BackendResult], checks: Sequence[Check]) -> str:
    """A group of bars for each ROUGE, a bar for each backend; thresholds over the first group."""
    height = 260.0
    bottom = height - _BOTTOM
    group = (WIDTH - _LEFT - _RIGHT) / len(ROUGES)
    bar = min(64.0, group * 0.8 / len(backends))
    marks = _levels(height)
    for n, name in enumerate(ROUGES):
        start = _LEFT + group * n + (group - bar * len(backends)) / 2
        for k, result in enumerate(backends):
            score = result.rouge.total[name]
            y = _height(score, bottom)
            title = element("title", f"{result.name}: {name} {score:.2f}")
            x = start + bar * k
            marks.append(
                element(
                    "rect",
                    title,
                    x=x + 1,
                    y=y,
                    width=bar - 2,
                    height=max(bottom - y, 0.5),
                    class_=f"bar{k % COLOURS}",
                )
            )
            marks.append(text(x + bar / 2, y - 5, f"{score:.1f}", class_="value middle"))
        middle = _LEFT + group * (n + 0.5)
        marks.append(text(middle, bottom + 19, name, class_="tick middle"))
    for threshold in sorted({c.threshold for c in checks if c.metric == "rouge1"}):
        if 0 <= threshold <= 100:
            y = _height(threshold, bottom)
            marks.append(element("line", x1=_LEFT, x2=_LEFT + group, y1=y, y2=y, class_="limit"))
            marks.append(text(_LEFT + 4, y - 4, f"{threshold:g}", class_="tick limit-text"))
    return picture(height, "ROUGE of every backend", *marks)


def _height(score: float, bottom: float) -> float:
    return bottom - score / 100 * (bottom - _TOP)


def _levels(height: float) -> list[str]:
    marks = []
    for level in range(0, 101, 25):
        y = _height(level, height - _BOTTOM)
        marks.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        marks.append(text(_LEFT - 8, y + 4, str(level), class_="tick end"))
    return marks


def spread_chart(backends: Sequence[BackendResult]) -> str:
    """A histogram of the articles' ROUGE-1 for each backend, on one scale, with its median."""
    row = 136.0
    counts = [_histogram([a["rouge1"] for a in r.rouge.articles]) for r in backends]
    most = max(max(bins) for bins in counts)
    width = (WIDTH - _LEFT - _RIGHT) / _BINS
    marks = []
    for k, (result, bins) in enumerate(zip(backends, counts, strict=True)):
        bottom = row * (k + 1)
        space = row - 58
        marks.append(
            element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="grid")
        )
        for n, count in enumerate(bins):
            if count:
                tall = max(space * count / most, 1.5)
                low, high = 100 // _BINS * n, 100 // _BINS * (n + 1)
                x = _LEFT + width * n
                marks.append(
                    element(
                        "rect",
                        element("title", f"{result.name}: {count} articles from {low} to {high}"),
                        x=x + 1,
                        y=bottom - tall,
                        width=width - 2,
                        height=tall,
                        class_=f"bar{k % COLOURS}",
                    )
                )
                label = text(x + width / 2, bottom - tall - 4, str(count), class_="tick middle")
                marks.append(label)
        scores = sorted(article["rouge1"] for article in result.rouge.articles)
        median = (scores[len(scores) // 2] + scores[(len(scores) - 1) // 2]) / 2
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * median / 100
        marks.append(
            element("line", x1=x, x2=x, y1=bottom - space - 6, y2=bottom, class_="middle-line")
        )
        words = f"{result.name}: median {median:.1f}, lowest {scores[0]:.1f}"
        marks.append(text(_LEFT, bottom - row + 26, words, class_="value"))
    bottom = row * len(backends)
    for level in range(0, 101, 10):
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * level / 100
        marks.append(text(x, bottom + 18, str(level), class_="tick middle"))
    marks.append(text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 36, "rouge1", class_="tick middle"))
    return picture(bottom + 44, "articles by their ROUGE-1, for every backend", *marks)


def _histogram(scores: Sequence[float]) -> list[int]:
    bins = [0] * _BINS
    for score in scores:
        bins[min(int(score / 100 * _BINS), _BINS - 1)] += 1
    return bins
