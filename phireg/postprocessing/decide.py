"""Whether a checkpoint needs post-processing, from everything that tells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.errors import CheckError, SourceError, UsageError
from phireg.layout.spans import LayoutError
from phireg.postprocessing.evidence import Evidence, from_manifest, from_producer
from phireg.postprocessing.orders import BLOCK, MENDABLE, RIGHT, Orders, orders_of
from phireg.postprocessing.ranks import Ranks
from phireg.postprocessing.rows import compare_rows
from phireg.postprocessing.tensors import algorithm_of, row_tensors

if TYPE_CHECKING:
    from phireg.family import Family
    from phireg.planning.model import Plan

FLAG = "--in-source-order"

_NO_MARK = Evidence(
    "producer",
    None,
    "postprocess_quant_checkpoint.py leaves no mark: if it may have been run, --model-dir tells",
)

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done, and why.

    Attributes:
        order: the order the rows are in: ``right``, ``block`` or ``parts``.
        every: the linears concerned.
        evidence: everything that told, the deciding one first.
    """

    order: str
    every: tuple[Orders, ...]
    evidence: tuple[Evidence, ...]

    @property
    def needed(self) -> bool:
        """Whether the rows are to be put into another order."""
        return self.order != RIGHT


def linears_of(
    family: Family, config: Mapping[str, Any], ranks: Ranks, directory: Path
) -> tuple[Orders, ...]:
    """The linears that an exporter may have left in the source's order; empty if there are none.

    Raises:
        SourceError: config.json lacks a size.
        CheckError: its sizes do not fit each other or the ranks, or are not those of the tensors.
        PluginError: the family failed.
    """
    algorithm = algorithm_of(config)
    fields = _fields(config, ranks, directory)
    try:
        rules = family.quant_rules(fields, algorithm or "").postprocess
        every = tuple(orders_of(rule, len(ranks)) for rule in rules.values())
    except LayoutError as problem:
        raise CheckError(
            f"{directory}: config.json's sizes do not fit {len(ranks)} rank(s): {problem}",
            hint="quantize again, with phireg quantize or with TP 1.",
        ) from None
    every = tuple(orders for orders in every if set(MENDABLE) & set(orders.by_name))
    for orders in every:
        row_tensors(ranks, orders)
    return every


def decide(
    directory: Path,
    config: Mapping[str, Any],
    ranks: Ranks,
    every: tuple[Orders, ...],
    plan: Plan | None,
    *,
    stated: bool,
) -> Decision:
    """Weigh what tells the order: rows before the manifest, it before the producer.

    Args:
        directory: the checkpoint.
        config: its config.json.
        ranks: its files.
        every: the linears concerned, at least one.
        plan: of the source, if it was given.
        stated: whether the user says that the rows are in the source's order.

    Raises:
        CheckError: the rows contradict the manifest or themselves.
        SourceError: a file is damaged.
        UsageError: nothing tells, or what the user states is not so.
    """
    manifest = from_manifest(directory, ranks, every)
    found = compare_rows(ranks, every, plan, algorithm_of(config)) if plan else None
    rows = found.evidence if found else None
    producer = from_producer(config)
    if rows and manifest and rows.right is False:
        raise CheckError(
            f"the evidence is contradictory: {rows.text}; but {manifest.text}",
            hint="is --model-dir the model that the checkpoint was made from?",
        )
    said = [evidence for evidence in (rows, manifest, producer) if evidence]
    telling = [evidence for evidence in said if evidence.right is not None]
    if stated and telling and telling[0].right:
        raise UsageError(f"{FLAG} is not so: {telling[0].text}", hint="leave it out.")
    if not telling and stated:
        telling = [Evidence("stated", False, f"{FLAG} was given")]
    if not telling:
        seen = "".join(f"\n  {evidence.text}" for evidence in said)
        raise UsageError(
            f"nothing in {directory} tells whether its rows are in the source's order{seen}",
            hint=f"give the model it was made from with --model-dir, or state it: {FLAG}.",
        )
    evidence = (telling[0], *(other for other in said if other is not telling[0]))
    if telling[0].right:
        return Decision(RIGHT, every, evidence)
    if found and found.order:
        return Decision(found.order, every, evidence)
    if len(ranks) > 1:
        raise UsageError(
            f"the rows are in the source's order ({telling[0].text}), but how they were cut over "
            f"{len(ranks)} ranks is not known",
            hint="give the model it was made from with --model-dir: its rows tell.",
        )
    if telling[0].source == "producer":
        evidence += (_NO_MARK,)
    return Decision(BLOCK, every, evidence)


def check_source(config: Mapping[str, Any], plan: Plan) -> None:
    """Refuse a source that the checkpoint cannot have been made from.

    Raises:
        SourceError: it has errors, or another architecture or size.
    """
    if plan.errors:
        first = plan.errors[0]
        raise SourceError(f"{plan.source.directory}: {first.subject} {first.detail}")
    for key in ("architecture", *_SIZES):
        found, wanted = config.get(key), plan.config.get(key)
        if found is not None and wanted is not None and found != wanted:
            raise SourceError(
                f"{plan.source.directory} is not the source of this checkpoint: {key} is "
                f"{wanted!r}, in the checkpoint {found!r}",
                hint="give the model that this checkpoint was made from.",
            )


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
)


def _fields(config: Mapping[str, Any], ranks: Ranks, directory: Path) -> dict[str, Any]:
    """config.json with the sizes under the names that families use.

    Early exporters write ``num_kv_heads`` alone and no ``head_size``.
    """
    made = dict(config)
    if made.get("num_key_value_heads") is None and made.get("num_kv_heads") is not None:
        made["num_key_value_heads"] = made["num_kv_heads"]
    elif made.get("num_kv_heads") not in (None, made.get("num_key_value_heads")):
        raise SourceError(
            f"{directory / 'config.json'}: num_key_value_heads is "
            f"{made['num_key_value_heads']!r} and num_kv_heads {made['num_kv_heads']!r}"
        )
    if made.get("head_size") is None:
        with suppress(TypeError, ZeroDivisionError, KeyError):
            made["head_size"] = made["hidden_size"] // made["num_attention_heads"]
    for key in _SIZES:
        if type(made.get(key)) is not int or made[key] < 1:
            raise SourceError(f"{directory / 'config.json'}: {key} is {made.get(key)!r}")
    layers = _layers(ranks.headers[0].entries)
    if layers != made["num_hidden_layers"]:
        raise CheckError(
            f"{directory}: config.json says {made['num_hidden_layers']} layers, "
            f"{ranks.paths[0].name} has {layers}"
        )
    return made


def _layers(names: Sequence[str] | Mapping[str, Any]) -> int:
    return len({found[1] for name in names if (found := _LAYER.search(name))})
