"""One self-contained HTML page about a quantization."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from phireg.quality.charts import Measure, applicable, heat_map, hidden_chart
from phireg.quality.result import LinearQuality, Quality
from phireg.quality.style import CSS
from phireg.quality.words import decibels, percent, share, times
from phireg.report.document import document, write_page

_WORST = 16


def write_report(found: Quality, path: Path) -> None:
    """Write the page; it appears complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_page(render(found), path)


def render(found: Quality) -> str:
    """The page as text."""
    return document(f"{found.name}: {found.scheme}", _body(found), CSS)


def _body(found: Quality) -> Iterator[str]:
    yield _verdict(found)
    yield _text(found)
    yield (
        '<section><h2>Linears</h2><p class="soft">Layers across, linears down; the warmer, the '
        "worse. What is compared are the factors of each product: of SmoothQuant the smoothed "
        "input and the smoothed weight.</p>"
        + "".join(_map(found, measure) for measure in applicable(found))
        + "</section>"
    )
    yield (
        '<section><h2>Hidden states</h2><p class="soft">How far the quantized model&rsquo;s states '
        "are from the unquantized model&rsquo;s behind every layer, relative to their size: the "
        "mean over all tokens. Errors of earlier layers are in it.</p>"
        f'<div class="scroll">{hidden_chart(found.hidden)}</div></section>'
    )
    yield _worst(found)
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in found.provenance)
    yield f"<section><h2>Provenance</h2><dl>{rows}</dl></section>"


def _verdict(found: Quality) -> str:
    facts = " · ".join(
        escape(fact)
        for fact in (
            found.architecture,
            found.family,
            f"{len(found.hidden)} layers",
            found.dtype,
            f"TP {found.tp_size}",
        )
    )
    state = "passed" if found.close else "failed"
    mark = "✓ close" if found.close else "✗ not close"
    return (
        f'<header class="verdict {state}"><p class="word">{mark}</p>'
        f"<h1>{escape(found.name)}: {escape(found.scheme)}</h1>"
        f'<p class="soft">{facts}</p><p class="finding">It is {escape(found.verdict)}.</p></header>'
    )


def _text(found: Quality) -> str:
    text = found.text
    numbers = (
        (f"{text.perplexity:.4g}", "perplexity"),
        (f"{text.unquantized_perplexity:.4g}", "perplexity, unquantized"),
        (f"{text.top1:.1%}", "same next token"),
        (f"{text.kl:.2g}", "KL divergence, nats"),
        (f"{found.hidden[-1]:.2%}", "error of the last layer's states"),
    )
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in numbers)
    which = "which were calibrated on as well" if text.calibrated else "not calibrated on"
    rows = f"{text.rows} sample{'s' if text.rows > 1 else ''}"
    return (
        f'<section><h2>Text</h2><p class="soft">{escape(text.origin)}: {rows}, '
        f"{text.tokens:,} tokens, {which}. Both models ran on the executor, in float32.</p>"
        f'<div class="numbers">{shown}</div></section>'
    )


def _map(found: Quality, measure: Measure) -> str:
    keys = "".join(
        f'<span><i class="square" style="background:var(--h{n})"></i>{escape(label)}</span>'
        for n, label in enumerate(measure.labels)
    )
    return (
        f'<h3>{measure.name}</h3><p class="soft">{measure.meaning}</p>'
        f'<p class="legend">{keys}</p><div class="scroll">{heat_map(found, measure)}</div>'
    )


def _worst(found: Quality) -> str:
    worst = found.worst_first()[:_WORST]
    inputs = found.linears[0].activation is not None
    heads = ["weight error", "SQNR, dB"]
    heads += ["input error", "SQNR, dB", "saturation"] if inputs else []
    head = "".join(f'<th class="n">{name}</th>' for name in [*heads, "outliers"])
    rows = "".join(_row(one) for one in worst)
    return (
        f"<section><h2>The worst {len(worst)} of {len(found.linears)} linears</h2>"
        f'<p class="soft">By {"the larger of the two errors" if inputs else "their error"}.</p>'
        '<div class="scroll"><table><tr><th class="n">layer</th><th>linear</th>'
        f"{head}</tr>{rows}</table></div></section>"
    )


def _row(one: LinearQuality) -> str:
    cells = [percent(one.weight), decibels(one.weight)]
    if one.activation is not None:
        cells += [percent(one.activation), decibels(one.activation), share(one.saturation)]
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in [*cells, times(one.outliers)])
    return f'<tr><td class="n">{one.layer}</td><td>{escape(one.linear)}</td>{numbers}</tr>'
