"""``phireg families``: what can be converted, and who provides it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from phireg.cli.options import json_option
from phireg.cli.text import columns, emit, emit_json

if TYPE_CHECKING:
    from phireg.jobs import FamilyInfo


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List families, published models and the TP sizes that work.

    A family that cannot be loaded is listed with what is wrong with it.
    """
    from phireg import jobs

    found = jobs.families()
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
        "dtypes": _dtypes(),
        "quantization": _formats(),
        "published": [
            {"repo_id": model, "tp_sizes": list(sizes)} for model, sizes in info.tp_sizes.items()
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
    by_sizes: dict[tuple[int, ...], list[str]] = {}
    for model, sizes in info.tp_sizes.items():
        by_sizes.setdefault(tuple(sizes), []).append(model)
    for models in by_sizes.values():
        for model in models:
            yield label, model
            label = ""
    for sizes in by_sizes:
        which = "" if len(by_sizes) == 1 else f"  ({', '.join(by_sizes[sizes])})"
        yield "TP sizes", ", ".join(map(str, sizes)) + which
    yield "dtypes", ", ".join(_dtypes())
    yield "quantization", ", ".join(_formats())


def _dtypes() -> list[str]:
    from phireg.plan.model import DTYPES

    return list(DTYPES)


def _formats() -> list[str]:
    from phireg.quant.schemes import WEIGHT_ONLY

    return [f"weight-only {precision}" for precision in WEIGHT_ONLY]
