"""From differing outputs to problems: which tensors, on which ranks, and what they look like."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Bits
from phireg.conversion.stream import assemble
from phireg.layout.spans import take
from phireg.planning.model import Output, Plan, Rows
from phireg.planning.report import ranges
from phireg.source.model import Reader
from phireg.verification.diagnose import Diagnosis, diagnose
from phireg.verification.patterns import Heads, Ranks
from phireg.verification.result import Problem
from phireg.verification.weights import Difference

MOST_LOOKED_AT = 24
"""Tensors that are looked at closely; a systematic mistake shows in the first ones."""

_MOST_BYTES = 2**31
"""A tensor of more bytes over all ranks is only located: looking holds it whole."""

_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")


def place_of(name: str) -> tuple[int | None, str]:
    """Layer and part that a tensor belongs to; a norm belongs to what it feeds."""
    match = _LAYER.match(name)
    if match:
        attention = match[2].startswith(("attention", "input_layernorm"))
        return int(match[1]), "attention" if attention else "mlp"
    if name.startswith("lm_head"):
        return None, "lm_head"
    return None, "embedding" if "embedding" in name else "final norm"


def heads_of(config: Mapping[str, Any]) -> Heads:
    """The layout of a planned config."""
    return Heads(
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_size"],
        config["hidden_act"],
    )


def recognise(plan: Plan, files: RankFiles, differences: Iterable[Difference]) -> list[Problem]:
    """One problem for each tensor name, whatever ranks it differs on."""
    by_name: dict[str, list[Difference]] = {}
    for difference in differences:
        by_name.setdefault(difference.output.name, []).append(difference)
    outputs: dict[str, list[Output]] = {}
    for output in plan.outputs:
        outputs.setdefault(output.name, []).append(output)
    problems = []
    with plan.source.open() as reader:
        for number, (name, found) in enumerate(by_name.items()):
            ranks = outputs[name]
            there = all(files.kind(o.rank, name) == (o.dtype, o.shape) for o in ranks)
            small = sum(output.nbytes for output in ranks) <= _MOST_BYTES
            if number < MOST_LOOKED_AT and there and small:
                seen = _look(plan, files, reader, outputs, ranks)
            else:
                seen = _located(found)
            layer, part = place_of(name)
            where = f"rank{ranges(d.output.rank for d in found)} {name}"
            problems.append(Problem(where, seen.text, seen.hint, layer, part))
    return problems


def _look(
    plan: Plan,
    files: RankFiles,
    reader: Reader,
    outputs: Mapping[str, list[Output]],
    ranks: list[Output],
) -> Diagnosis:
    expected = [assemble(plan, output, reader) for output in ranks]
    found = [files[o.rank].read(o.name).reshape(o.matrix) for o in ranks]
    return diagnose(
        ranks[0].name,
        ranks[0].dtype,
        expected,
        found,
        heads_of(plan.config),
        lambda: _others(ranks, outputs, found, _rows(plan, reader)),
    )


def _rows(plan: Plan, reader: Reader) -> Callable[[Output, int | None], Bits]:
    def read(output: Output, count: int | None) -> Bits:
        if count is not None:
            rows, columns = output.matrix
            rows = min(count, rows)
            assert isinstance(output.origin, Rows)
            first = dataclasses.replace(output.origin, spans=take(output.origin.spans, 0, rows))
            output = dataclasses.replace(output, shape=(rows, columns), origin=first)
        return assemble(plan, output, reader)

    return read


def _others(
    ranks: list[Output],
    outputs: Mapping[str, list[Output]],
    found: Ranks,
    read: Callable[[Output, int | None], Bits],
) -> Iterator[tuple[str, Ranks]]:
    """Tensors of the same shapes whose first rows are what was found."""
    shapes = [output.shape for output in ranks]
    first = 1 if len(shapes[0]) > 1 else None
    for name, others in outputs.items():
        if name == ranks[0].name or [output.shape for output in others] != shapes:
            continue
        row = read(others[0], first)
        if np.array_equal(row, found[0][: len(row)]):
            yield name, [read(output, None) for output in others]


def _located(found: list[Difference]) -> Diagnosis:
    elements = sum(d.elements for d in found)
    size = sum(int(np.prod(d.output.shape)) for d in found)
    row, column = found[0].first
    return Diagnosis(
        f"{elements:,} of {size:,} elements differ, first at row {row}, column {column}"
    )
