"""``phireg families``: installed families, their models and TP sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from phireg.cli.help import documented
from phireg.cli.options import json_option
from phireg.cli.output import columns, emit, emit_json
from phireg.dtypes import WEIGHT_DTYPES

if TYPE_CHECKING:
    from phireg.registry import FamilyInfo


@documented(
    "phireg families",
    "phireg families --json",
)
@json_option
def command(as_json: bool) -> None:
    """List families, published models and the TP sizes that work.

    A broken family is listed with its problem.
    """
    from phireg.registry import families

    infos = families()
    if as_json:
        emit_json({"families": [_entry(info) for info in infos]})
    else:
        emit("\n\n".join([_text(info) for info in infos] or ["no families are installed"]))


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
