"""Every family that is offered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phireg import registry
from phireg.config.hf import HFConfig
from phireg.errors import PluginError
from phireg.family import Family
from phireg.layout.ranks import tp_sizes
from phireg.layout.spans import LayoutError
from phireg.reader.schemes import SCHEMES
from phireg.registry import Candidate


@dataclass(frozen=True, slots=True)
class FamilyInfo:
    """A family as ``phireg families`` shows it.

    Attributes:
        candidate: who offers it.
        family: the loaded family, or None if it cannot be loaded.
        tp_sizes: for each published model, the numbers of ranks that work.
        qformats: for each published model, the formats it can be quantized to.
        problem: why it cannot be loaded, if so.
    """

    candidate: Candidate
    family: Family | None
    tp_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    qformats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problem: str | None = None


def families() -> tuple[FamilyInfo, ...]:
    """Every family that is offered, loaded where that works."""
    infos = []
    for candidate in (c for offers in registry.index().values() for c in offers):
        try:
            family = candidate.load()
            made = {m.repo_id: _published(family, m.config) for m in family.published}
        except (PluginError, LayoutError) as error:
            infos.append(FamilyInfo(candidate, None, problem=str(error)))
        else:
            sizes = {model: found[0] for model, found in made.items()}
            formats = {model: found[1] for model, found in made.items()}
            infos.append(FamilyInfo(candidate, family, sizes, formats))
    return tuple(infos)


def _published(
    family: Family, config: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """TP sizes, and the formats for which the family names linears."""
    hf = HFConfig(config)
    fields = family.config_fields().translate(hf).fields
    formats = (
        name
        for name, scheme in SCHEMES.items()
        if family.quant_rules(fields, scheme.quant_algo).linears
    )
    return tuple(tp_sizes(family.weight_rules(fields, hf))), tuple(formats)
