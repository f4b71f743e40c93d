"""``phireg plugins``: every offer of a family, whether it works or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from phireg.cli.options import json_option
from phireg.cli.output import columns, emit, emit_json
from phireg.errors import PluginError

if TYPE_CHECKING:
    from phireg.family import Family
    from phireg.registry import Candidate


@dataclass(slots=True)
class _Row:
    """A candidate and what is known about it; ``family`` and ``problem`` need an import."""

    candidate: Candidate
    api: int | None
    select: str
    family: Family | None = None
    problem: str | None = None
    note: str | None = None


@click.command()
@click.option("--check", is_flag=True, help="Import each plugin and say what is wrong with it.")
@json_option
def command(check: bool, as_json: bool) -> None:
    """List plugins and the distributions they come from.

    Without --check nothing is imported. With it, ends with 5 if a plugin is broken.
    """
    from phireg import registry
    from phireg.hookspecs import API

    entry_points, damaged = registry.installed_entry_points()
    rows = _rows([c for offers in registry.index(entry_points).values() for c in offers])
    if check:
        for row in rows:
            _check(row)
        _note_aliases(rows)
    if as_json:
        emit_json(
            {
                "api": API,
                "checked": check,
                "plugins": [_entry(row) for row in rows],
                "unreadable": damaged,
            }
        )
    else:
        emit(_text(rows, damaged, check, API))
    if any(row.problem for row in rows):
        raise click.exceptions.Exit(PluginError.exit_code)


def _rows(candidates: Sequence[Candidate]) -> list[_Row]:
    from phireg.declared import declared_api

    counts = Counter(c.name for c in candidates)
    return [
        _Row(c, declared_api(c.value), c.name if counts[c.name] == 1 else c.qualified)
        for c in candidates
    ]


def _check(row: _Row) -> None:
    """Import a plugin and ask its hooks about the models it says it converts."""
    from phireg.config.hf import HFConfig
    from phireg.layout.spans import LayoutError

    try:
        family = row.candidate.load()
        row.api = family.api
        table = family.config_fields()
        for model in family.published:
            hf = HFConfig(model.config)
            translation = table.translate(hf)
            if not translation.ok:
                found = "; ".join(f"{f.subject}: {f.detail}" for f in translation.findings)
                row.problem = f"its own model {model.repo_id} is refused: {found}"
                return
            family.weight_rules(translation.fields, hf)
        row.family = family
    except (PluginError, LayoutError) as error:
        row.problem = str(error)


def _note_aliases(rows: Sequence[_Row]) -> None:
    """Say which families answer every hook as another one does, and are not told apart from it."""
    for row in rows:
        for other in rows:
            mine, theirs = row.family, other.family
            if mine and theirs and mine is not theirs and mine.steps == theirs.steps:
                if not (mine.tell_apart or mine.published):
                    row.note = f"overrides nothing: it converts exactly as {other.select} does"
                break


def _entry(row: _Row) -> dict[str, Any]:
    return {
        "name": row.candidate.name,
        "distribution": row.candidate.distribution,
        "version": row.candidate.version,
        "value": row.candidate.value,
        "api": row.api,
        "select": row.select,
        "problem": row.problem,
        "note": row.note,
    }


def _text(rows: Sequence[_Row], damaged: Sequence[str], check: bool, speaks: int) -> str:
    if not rows:
        return "\n".join(["no plugins are installed", *damaged])
    table = []
    for row in rows:
        c = row.candidate
        api = "API ?" if row.api is None else f"API {row.api}"
        state = [] if not check else ["broken" if row.problem else "works"]
        table.append((c.name, f"{c.distribution} {c.version}", c.value, api, *state))
    return "\n".join([columns(table), *_remarks(rows, speaks), *damaged])


def _remarks(rows: Sequence[_Row], speaks: int) -> Iterator[str]:
    for row in rows:
        if row.problem:
            yield f"\n{row.candidate.qualified}\n    {row.problem}"
        elif row.note:
            yield f"\n{row.candidate.qualified}\n    {row.note}"
        elif row.api not in (speaks, None):
            yield f"\n{row.candidate.qualified}\n    this phireg speaks API {speaks}"
    choices: dict[str, list[str]] = {}
    for row in rows:
        if row.select != row.candidate.name:
            choices.setdefault(row.candidate.name, []).append(f"--family {row.select}")
    for name, options in choices.items():
        yield f"\n{name} is offered {len(options)} times; say which: {'  or  '.join(options)}"
