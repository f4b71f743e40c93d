"""One self-contained HTML page about a verification."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from phireg.report.document import document, write_page
from phireg.verification.charts import attention_chart, layer_chart, position_chart
from phireg.verification.measure_types import LogitsResult, shown
from phireg.verification.result import CHECKS, Check, Problem, Verification
from phireg.verification.style import CSS

_MARKS = {"passed": "✓", "failed": "✗", "skipped": "·"}
_MOST_PROBLEMS = 40


def write_report(found: Verification, path: Path) -> None:
    """Write the page; it appears complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_page(render(found), path)


def render(found: Verification) -> str:
    """The page as text."""
    return document(f"{Path(found.checkpoint_dir).name}: {_word(found)}", _body(found), CSS)


def _word(found: Verification) -> str:
    if not found.passed:
        return "not its source" if any(c.problems for c in found.checks) else "not verified"
    return "verified in part" if found.unchecked else "verified"


def leading_problem(found: Verification) -> Problem | None:
    """The problem that says most: what a tensor or key looks like, before what follows from it."""
    for name in ("config", "weights", "structure", "logits", "ranks"):
        for check in found.checks:
            if check.name == name and check.problems:
                return check.problems[0]
    return None


def _body(found: Verification) -> Iterator[str]:
    yield _verdict(found)
    yield (
        "<section><h2>Checks</h2>" + "".join(_check(check) for check in found.checks) + "</section>"
    )
    if found.logits is not None:
        yield _layers(found.logits)
        yield _logits(found.logits)
    pattern = attention_chart(found.config)
    if pattern is not None:
        yield _attention(found, pattern)
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in found.provenance)
    yield f"<section><h2>Provenance</h2><dl>{rows}</dl></section>"


def _verdict(found: Verification) -> str:
    config, mapping = found.config, found.config.get("mapping")
    ranks = mapping.get("tp_size", 1) if isinstance(mapping, dict) else 1
    facts = " · ".join(
        escape(str(fact))
        for fact in (
            config.get("architecture"),
            found.family,
            f"{config.get('num_hidden_layers')} layers",
            config.get("dtype"),
            f"TP {ranks}",
        )
    )
    finding = ""
    problem = leading_problem(found)
    if problem is not None:
        where = f"<code>{escape(problem.where)}</code>"
        finding = f'<p class="finding">{where}<br>{escape(problem.text)}</p>'
    elif found.unchecked:
        finding = f'<p class="soft">not checked: {", ".join(found.unchecked)}</p>'
    state = "passed" if found.passed else "failed"
    return (
        f'<header class="verdict {state}"><p class="word">{_MARKS[state]} {_word(found)}</p>'
        f"<h1>{escape(Path(found.checkpoint_dir).name)}</h1>"
        f'<p class="soft">{facts}</p>{finding}</header>'
    )


def _check(check: Check) -> str:
    shown = check.problems[:_MOST_PROBLEMS]
    items = [_problem(problem) for problem in shown]
    if len(check.problems) > len(shown):
        items.append(f"<li>and {len(check.problems) - len(shown)} more</li>")
    items += [f'<li class="note">{escape(note)}</li>' for note in check.notes]
    listed = f"<ul>{''.join(items)}</ul>" if items else ""
    return (
        f'<div class="check {check.verdict}"><span class="mark">{_MARKS[check.verdict]}</span>'
        f'<div><span class="name">{check.name}</span> '
        f'<span class="soft">{escape(CHECKS[check.name])}</span><br>'
        f"{escape(check.summary)}{listed}</div>"
        f'<span class="time">{check.seconds:.1f} s</span></div>'
    )


def _problem(problem: Problem) -> str:
    hint = f' <span class="hint">{escape(problem.hint)}</span>' if problem.hint else ""
    return f"<li><code>{escape(problem.where)}</code>{escape(problem.text)}{hint}</li>"


def _layers(result: LogitsResult) -> str:
    return (
        '<section><h2>Where it diverges</h2><p class="soft">Relative error of every sub-module on '
        "its worst token (of quantized parts, of all tokens). Each is given the reference&rsquo;s "
        "own input, so a wrong one does not blame those behind it; the line is the executor "
        "running on its own.</p>"
        '<p class="legend"><span><i style="background:var(--a)"></i>attention</span>'
        '<span><i style="background:var(--m)"></i>MLP</span>'
        '<span><i style="background:var(--ink)"></i>embedding, final norm, head</span>'
        '<span><i class="bar" style="background:var(--own)"></i>hidden states, own run</span></p>'
        f'<div class="scroll">{layer_chart(result)}</div></section>'
    )


def _logits(result: LogitsResult) -> str:
    rows = "".join(
        f'<tr><td class="n">{p.tokens:,}</td><td>{escape(p.purpose)}</td>'
        f'<td class="n">{shown(p.relative)}</td><td class="n">{shown(p.max_abs)}</td>'
        f'<td class="n">{shown(p.kl)}</td><td class="n">{p.top1:.1%}</td></tr>'
        for p in result.prompts
    )
    longest = result.prompts[-1]
    return (
        '<section><h2>Logits</h2><p class="soft">The executor, running on its own, against the '
        f"source&rsquo;s model, in {escape(result.dtype)} on {escape(result.device)}.</p>"
        '<div class="scroll"><table><tr><th class="n">tokens</th><th>prompt</th>'
        '<th class="n">relative error</th><th class="n">largest difference</th>'
        f'<th class="n">KL, nats</th><th class="n">same top-1</th></tr>{rows}</table></div>'
        f'<p class="soft">Every position of the prompt of {longest.tokens:,} tokens:</p>'
        f'<div class="scroll">{position_chart(result, longest)}</div></section>'
    )


def _attention(found: Verification, pattern: str) -> str:
    config = found.config
    layers, every = config.get("num_hidden_layers"), config.get("dense_attention_every_n_layers")
    which = ""
    if isinstance(layers, int) and isinstance(every, int) and every > 0:
        sparse = sum((layer + 1) % every != 0 for layer in range(layers))
        which = f"{sparse} of {layers} layers are block-sparse. "
    size = escape(str(config.get("blocksparse_block_size")))
    return (
        '<section><h2>Block-sparse attention</h2><p class="soft">'
        f"{which}One square per block of {size} tokens: down are queries, across the keys they "
        "see, for every head of the whole model.</p>"
        '<p class="legend"><span><i class="square" style="background:var(--near)"></i>local '
        'blocks</span><span><i class="square" style="background:var(--stripe)"></i>stripes'
        '</span><span><i class="square" style="background:var(--unseen)"></i>not seen</span></p>'
        f'<div class="scroll">{pattern}</div></section>'
    )
