"""``phireg families``: what can be converted, and who provides it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from phireg.cli.options import json_option
from phireg.cli.output import columns, emit, emit_json
from phireg.dtypes import WEIGHT_DTYPES

if TYPE_CHECKING:
    from phireg.families import FamilyInfo


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List families, published models and the TP sizes that work.

    A family that cannot be loaded is listed with what is wrong with it.
    """
    from phireg.families import families

    found = families()
    if as_json:
        emit_json({"families": [_entry(info) for info in found]})
    else:
        emit("\n\n".join([_text(info) for info in found] or ["no families are installed"]))


def _entry(info: FamilyInfo) -> dict[str, Any]:
    family = info.family
    return {
        "name": info.candidate.name,
        "distribution": info.candidate.distribution,
        "version": info.candidate.version,
        "value": info.candidate.value,
        "problem": info.problem,
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


def _text(info: FamilyInfo) -> str:
    candidate = info.candidate
    title = f"{candidate.name}  ({candidate.distribution} {candidate.version})"
    if info.family is None:
        return f"{title}  cannot be loaded\n    {info.problem}"
    return f"{title}\n{columns(_rows(info), indent=2)}"


def _rows(info: FamilyInfo) -> Iterator[tuple[str, str]]:
    assert info.family is not None
    yield "architecture", ", ".join(info.family.architectures)
    label = "models"
    for models in _grouped(info.tp_sizes).values():
        for model in models:
            yield label, model
            label = ""
    yield from _values("TP sizes", info.tp_sizes)
    yield "dtypes", ", ".join(list(WEIGHT_DTYPES))
    yield from _values("quantization", info.qformats)


def _values(label: str, by_model: Mapping[str, tuple[object, ...]]) -> Iterator[tuple[str, str]]:
    """A row, or one for each group of models that differ."""
    groups = _grouped(by_model)
    for values, models in groups.items():
        which = "" if len(groups) == 1 else f"  ({', '.join(models)})"
        yield label, (", ".join(map(str, values)) or "none") + which


def _grouped(by_model: Mapping[str, tuple[object, ...]]) -> dict[tuple[object, ...], list[str]]:
    """Models by what they have."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for model, values in by_model.items():
        groups.setdefault(tuple(values), []).append(model)
    return groups
