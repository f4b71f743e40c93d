"""One self-contained HTML page about a summarization."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from phireg.report.document import document
from phireg.summarization.charts import COLOURS, score_chart, spread_chart
from phireg.summarization.result import BackendResult, Summarization
from phireg.summarization.scores import ROUGES
from phireg.summarization.style import CSS

MOST_ARTICLES = 100
"""Articles shown with their texts; the worst ones."""

_WORD = re.compile(r"[a-z0-9]+", re.IGNORECASE)


def render(found: Summarization) -> str:
    """The page as text."""
    names = ", ".join(result.name for result in found.backends)
    return document(f"Summarization: {names}", _body(found), CSS)


def _body(found: Summarization) -> Iterator[str]:
    yield _verdict(found)
    yield _scores(found)
    yield (
        '<section><h2>Spread</h2><p class="soft">How many articles reach which ROUGE-1, in steps '
        "of 5; the line is the median.</p>"
        f'<div class="scroll">{spread_chart(found.backends)}</div></section>'
    )
    yield _articles(found)
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in found.provenance)
    yield f"<section><h2>Provenance</h2><dl>{rows}</dl></section>"


def _verdict(found: Summarization) -> str:
    word = "summarized"
    if found.checks:
        word = "✓ above the threshold" if found.passed else "✗ threshold missed"
    state = "passed" if found.passed else "failed"
    best = " · ".join(f"{escape(r.name)} {r.rouge.total['rouge1']:.1f}" for r in found.backends)
    note = f'<p class="note">{escape(found.note)}</p>' if found.note else ""
    checks = "".join(
        f'<li class="{"passed" if c.passed else "failed"}">{escape(str(c))}</li>'
        for c in found.checks
    )
    listed = f'<ul class="checks">{checks}</ul>' if checks else ""
    return (
        f'<header class="verdict {state}"><p class="word">{word}</p>'
        f"<h1>ROUGE-1: {best}</h1>"
        f'<p class="soft">{_count(len(found.samples), "article")} · {escape(found.data)}</p>'
        f"{note}{listed}</header>"
    )


def _scores(found: Summarization) -> str:
    ppl = '<th class="n">perplexity</th>' if found.settings.eval_ppl else ""
    head = "".join(f'<th class="n">{name}</th>' for name in ROUGES)
    rows = "".join(_row(found, n, result) for n, result in enumerate(found.backends))
    same = "".join(
        f'<p class="soft">{escape(one)} and {escape(other)}: {count} of {len(found.samples)} '
        "summaries are the same.</p>"
        for (one, other), count in found.agreement().items()
    )
    return (
        f'<section><h2>Scores</h2><div class="scroll"><table><tr><th>backend</th>{head}{ppl}'
        '<th class="n">tokens/s</th><th class="n">latency</th><th class="n">memory</th></tr>'
        f"{rows}</table></div>{same}"
        f'<div class="scroll">{score_chart(found.backends, found.checks)}</div></section>'
    )


def _row(found: Summarization, n: int, result: BackendResult) -> str:
    cells = [f"{result.rouge.total[name]:.2f}" for name in ROUGES]
    if found.settings.eval_ppl:
        cells.append("unknown" if result.perplexity is None else f"{result.perplexity:.3f}")
    cells += [f"{result.tokens_per_second:,.1f}", f"{result.latency:.3f} s"]
    used = "unknown" if result.memory is None else f"{result.memory / 2**20:,.4g} MiB"
    shown = "".join(f'<td class="n">{cell}</td>' for cell in [*cells, used])
    return f"<tr><td>{_name(n, result)}</td>{shown}</tr>"


def _name(n: int, result: BackendResult) -> str:
    return f'<i style="background:var(--b{n % COLOURS})"></i>{escape(result.name)}'


def _articles(found: Summarization) -> str:
    def worst(n: int) -> float:
        return min(result.rouge.articles[n]["rouge1"] for result in found.backends)

    order = sorted(range(len(found.samples)), key=worst)
    shown = order[:MOST_ARTICLES]
    which = f"The worst {len(shown)} of {len(order)}" if len(shown) < len(order) else "All"
    return (
        f'<section><h2>Articles</h2><p class="soft">{which}, worst first by the lowest ROUGE-1 of '
        "any backend. Words that the reference does not have are underlined.</p>"
        + "".join(_article(found, n) for n in shown)
        + "</section>"
    )


def _article(found: Summarization, n: int) -> str:
    sample = found.samples[n]
    words = {word.lower() for word in _WORD.findall(sample.reference)}
    sides = [f"<div><h4>reference</h4><p>{escape(sample.reference)}</p></div>"]
    for k, result in enumerate(found.backends):
        summary = result.answers[n].summary.strip()
        scores = result.rouge.articles[n]
        sides.append(
            f"<div><h4>{_name(k, result)} · {scores['rouge1']:.1f}</h4>"
            f"<p>{_marked(summary, words) or '(nothing)'}</p></div>"
        )
    return (
        f'<div class="article"><h3>{escape(sample.where)}'
        f"<span>{_count(len(sample.prompt), 'token')}</span></h3>"
        f'<div class="side">{"".join(sides)}</div>'
        f"<details><summary>the article</summary><p>{escape(sample.article)}</p></details></div>"
    )


def _marked(summary: str, known: set[str]) -> str:
    """The summary as HTML; words that are not known are marked."""
    made, end = [], 0
    for found in _WORD.finditer(summary):
        word = found.group()
        made.append(escape(summary[end : found.start()]))
        made.append(word if word.lower() in known else f"<mark>{word}</mark>")
        end = found.end()
    return "".join(made) + escape(summary[end:])


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
