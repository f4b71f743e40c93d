"""``phireg plugins``: every family that any distribution offers, working or broken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from phireg.cli.help import OUTPUT, documented
from phireg.cli.options import json_option
from phireg.cli.output import columns, emit, emit_json
from phireg.errors import PluginError

if TYPE_CHECKING:
    from phireg.registry import FamilyInfo, Index


@documented(
    "phireg plugins",
    "phireg plugins --check",
    page="plugin-authors.md",
)
@OUTPUT.option("--check", is_flag=True, help="Import each plugin and report its problems.")
@json_option
def command(check: bool, as_json: bool) -> None:
    """List plugins and the distributions they come from.

    Without --check nothing is imported. With it, the exit code is 5 if a plugin is broken.
    """
    from phireg import registry
    from phireg.hookspecs import API

    entry_points, unreadable = registry.installed_entry_points()
    candidates = registry.index(entry_points)
    if check:
        infos = registry.families(candidates)
    else:
        infos = tuple(registry.FamilyInfo(c) for offers in candidates.values() for c in offers)
    select = _select_names(candidates)
    notes = dict(_alias_notes(infos, select))
    if as_json:
        plugins = [_entry(info, select, notes) for info in infos]
        emit_json({"api": API, "checked": check, "plugins": plugins, "unreadable": unreadable})
    elif infos:
        table = [_row(info, check) for info in infos]
        emit("\n".join([columns(table), *_remarks(infos, select, notes), *unreadable]))
    else:
        emit("\n".join(["no plugins are installed", *unreadable]))
    if any(info.problem for info in infos):
        raise click.exceptions.Exit(PluginError.exit_code)


def _select_names(candidates: Index) -> dict[str, str]:
    """Map each candidate's qualified name to the value that ``--family`` needs."""
    return {
        candidate.qualified: candidate.name if len(offers) == 1 else candidate.qualified
        for offers in candidates.values()
        for candidate in offers
    }


def _alias_notes(infos: Sequence[FamilyInfo], select: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield a note for each family that has exactly the hooks of another one."""
    for info in infos:
        family = info.family
        if family is None or family.tell_apart or family.published:
            continue
        for other in infos:
            if other.family and family is not other.family and family.steps == other.family.steps:
                name = select[other.candidate.qualified]
                note = f"overrides nothing: it converts exactly as {name} does"
                yield info.candidate.qualified, note
                break


def _entry(info: FamilyInfo, select: dict[str, str], notes: dict[str, str]) -> dict[str, Any]:
    candidate = info.candidate
    return {
        "name": candidate.name,
        "distribution": candidate.distribution,
        "version": candidate.version,
        "value": candidate.value,
        "api": info.family.api if info.family else None,
        "select": select[candidate.qualified],
        "problem": info.problem,
        "note": notes.get(candidate.qualified),
    }


def _row(info: FamilyInfo, check: bool) -> tuple[str, ...]:
    candidate = info.candidate
    offer = (candidate.name, f"{candidate.distribution} {candidate.version}", candidate.value)
    if not check:
        return offer
    api = f"API {info.family.api}" if info.family else ""
    return (*offer, api, "works" if info.family else "broken")


def _remarks(
    infos: Iterable[FamilyInfo], select: dict[str, str], notes: dict[str, str]
) -> Iterator[str]:
    options: dict[str, list[str]] = {}
    for info in infos:
        qualified, name = info.candidate.qualified, info.candidate.name
        if remark := info.problem or notes.get(qualified):
            yield f"\n{qualified}\n    {remark}"
        if select[qualified] != name:
            options.setdefault(name, []).append(f"--family {qualified}")
    for name, choices in options.items():
        yield f"\n{name} is offered {len(choices)} times; choose one: {'  or  '.join(choices)}"
