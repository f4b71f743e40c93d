"""``phireg families``: installed families, working or broken, their models and TP sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from phireg.cli.help import OUTPUT, documented
from phireg.cli.options import json_option
from phireg.cli.output import columns, emit, emit_json, table
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import PluginError

if TYPE_CHECKING:
    from phireg.registry import FamilyInfo, Index, TargetInfo


@documented("phireg families", "phireg families --check", waits="loading the families")
@OUTPUT.option("--check", is_flag=True, help="One line for each; ends with 5 if one is broken.")
@json_option
def command(check: bool, as_json: bool) -> None:
    """List families, published models and the TP sizes that work.

    Then targets, with the readers of each format. Both are found through the entry points of all
    installed distributions. A broken one is listed with its problem.
    """
    from phireg import registry
    from phireg.hookspecs import API

    entry_points, unreadable = registry.installed_entry_points()
    candidates = registry.index(entry_points)
    infos = registry.families(candidates)
    select = _select_names(candidates)
    notes = dict(_alias_notes(infos, select))
    targets = tuple(registry.targets())
    broken = [info.problem for info in targets if info.problem]
    if as_json:
        entries = [_entry(info, select, notes) for info in infos]
        document = {"api": API, "families": entries, "unreadable": unreadable}
        emit_json(document | {"targets": [_target_entry(info) for info in targets]})
    elif check and infos:
        emit(
            "\n".join(
                [table(map(_row, infos)), *_remarks(infos, select, notes), *broken, *unreadable]
            )
        )
    else:
        texts = list(map(_text, infos)) or ["no families are installed"]
        texts += map(_target_text, targets)
        emit("\n\n".join([*texts, *unreadable]))
    if check and (broken or any(info.problem for info in infos)):
        raise click.exceptions.Exit(PluginError.exit_code)


def _entry(info: FamilyInfo, select: dict[str, str], notes: dict[str, str]) -> dict[str, Any]:
    family = info.family
    return {
        "name": info.candidate.name,
        "distribution": info.candidate.distribution,
        "version": info.candidate.version,
        "value": info.candidate.value,
        "select": select[info.candidate.qualified],
        "problem": info.problem,
        "note": notes.get(info.candidate.qualified),
        "api": family.api if family else None,
        "auto": family.auto if family else None,
        "architectures": list(family.architectures) if family else [],
        "model_types": list(family.model_types) if family else [],
        "dtypes": list(WEIGHT_DTYPES),
        "quantization": list(dict.fromkeys(chain.from_iterable(info.qformats.values()))),
        "published": [
            {"repo_id": model, "tp_sizes": list(sizes), "qformats": list(info.qformats[model])}
            for model, sizes in info.tp_sizes.items()
        ],
    }


def _target_entry(info: TargetInfo) -> dict[str, Any]:
    from phireg.targets.readers import FP8_CACHE, UNQUANTIZED, as_json

    target, name = info.target, info.candidate.name
    layouts = target.layouts if target else {}
    return {
        "name": name,
        "distribution": info.candidate.distribution,
        "version": info.candidate.version,
        "problem": info.problem,
        "summary": target.summary if target else None,
        "kv_caches": list(target.kv_caches) if target else [],
        "cache_readers": as_json(name, FP8_CACHE),
        "unquantized_readers": as_json(name, UNQUANTIZED),
        "formats": [
            {
                "qformat": qformat,
                "quant_algo": layouts[qformat].algorithm,
                "readers": as_json(name, qformat),
            }
            for qformat in (target.formats if target else ())
        ],
    }


def _target_text(info: TargetInfo) -> str:
    from phireg.targets.readers import READERS, UNQUANTIZED

    candidate, target = info.candidate, info.target
    title = f"--target {candidate.name}  ({candidate.distribution} {candidate.version})"
    if target is None:
        return f"{title}  cannot be loaded\n    {info.problem}"
    known = READERS.get(target.name, {})
    rows = [("", target.summary)]
    for name in (UNQUANTIZED, *target.formats):
        if name in known or name != UNQUANTIZED:
            readers = ", ".join(reader.text for reader in known.get(name, ()))
            rows.append((name, readers or "no reader known"))
    rows.append(("KV caches", ", ".join(target.kv_caches) or "as the model's dtype"))
    return f"{title}\n{columns(rows, indent=2)}"


def _text(info: FamilyInfo) -> str:
    candidate = info.candidate
    title = f"{candidate.name}  ({candidate.distribution} {candidate.version})"
    if info.family is None:
        return f"{title}  cannot be loaded\n    {info.problem}"
    models = list(chain.from_iterable(_grouped(info.tp_sizes).values()))
    rows = [
        ("architecture", ", ".join(info.family.architectures)),
        *(("" if number else "models", model) for number, model in enumerate(models)),
        *_rows("TP sizes", info.tp_sizes),
        ("dtypes", ", ".join(WEIGHT_DTYPES)),
        *_rows("quantization", info.qformats),
    ]
    return f"{title}\n{columns(rows, indent=2)}"


def _rows(label: str, by_model: Mapping[str, tuple[object, ...]]) -> Iterator[tuple[str, str]]:
    """Yield one row, or one for each group of models with equal values."""
    groups = _grouped(by_model)
    for values, models in groups.items():
        which = "" if len(groups) == 1 else f"  ({', '.join(models)})"
        yield label, (", ".join(map(str, values)) or "none") + which


def _grouped(by_model: Mapping[str, tuple[object, ...]]) -> dict[tuple[object, ...], list[str]]:
    groups: dict[tuple[object, ...], list[str]] = {}
    for model, values in by_model.items():
        groups.setdefault(tuple(values), []).append(model)
    return groups


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


def _row(info: FamilyInfo) -> tuple[str, ...]:
    candidate = info.candidate
    offer = (candidate.name, f"{candidate.distribution} {candidate.version}", candidate.value)
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
