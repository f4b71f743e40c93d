"""``phireg plugins``: every offer of a family, whether it works or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from phireg.cli.options import json_option
from phireg.cli.text import columns, emit, emit_json
from phireg.errors import PluginError

if TYPE_CHECKING:
    from phireg.registry import Candidate


@click.command()
@click.option("--check", is_flag=True, help="Import each plugin and say what is wrong with it.")
@json_option
def command(check: bool, as_json: bool) -> None:
    """List plugins and the distributions they come from.

    Without --check nothing is imported. With it, ends with 5 if a plugin is broken.
    """
    from phireg import registry

    found = [candidate for offers in registry.index().values() for candidate in offers]
    results = {c: _check(c) if check else (None, None) for c in found}
    if as_json:
        emit_json(
            {
                "checked": check,
                "plugins": [
                    {
                        "name": c.name,
                        "distribution": c.distribution,
                        "version": c.version,
                        "value": c.value,
                        "api": api,
                        "problem": problem,
                    }
                    for c, (api, problem) in results.items()
                ],
            }
        )
    else:
        emit(_text(results, check) if results else "no plugins are installed")
    if any(problem for _, problem in results.values()):
        raise click.exceptions.Exit(PluginError.exit_code)


Result = tuple["int | None", "str | None"]
"""API number and problem."""


def _check(candidate: Candidate) -> Result:
    try:
        return candidate.load().api, None
    except PluginError as error:
        return None, str(error)


def _text(results: dict[Candidate, Result], check: bool) -> str:
    rows = []
    for c, (api, problem) in results.items():
        state = [] if not check else ["broken" if problem else f"works, API {api}"]
        rows.append((c.name, f"{c.distribution} {c.version}", c.value, *state))
    return "\n".join([columns(rows), *_remarks(results)])


def _remarks(results: dict[Candidate, Result]) -> Iterator[str]:
    for c, (_, problem) in results.items():
        if problem:
            yield f"\n{c.qualified}\n    {problem}"
    for name, count in Counter(c.name for c in results).items():
        if count > 1:
            choices = [f"--family {c.qualified}" for c in results if c.name == name]
            yield f"\n{name} is offered {count} times; say which: {'  or  '.join(choices)}"
