"""Locate wrong tensors, and name the mistake where it is one that exporters make."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Float32
from phireg.conversion.stream import assemble, kept_columns
from phireg.dtypes import UNIT_ROUNDOFF, float32_values
from phireg.planning.model import Output, Plan, Rows
from phireg.planning.report import ranges
from phireg.source.model import Reader
from phireg.verification.comparison import Difference, is_comparable
from phireg.verification.orders import REGROUP, Array, Heads, Mistake, Ranks, named_mistake
from phireg.verification.quantized import SMOOTHER, WEIGHT_SCALE, LinearComparison, Tolerance
from phireg.verification.result import Problem, place_of

_MOST_EXPLAINED = 24
"""Tensors whose mistake is looked for; a systematic one shows in the first ones."""

_MOST_ELEMENTS = 2**30
"""A larger tensor, over all ranks, is only located: looking for a mistake holds it in memory."""


def explain(plan: Plan, files: RankFiles, differences: Iterable[Difference]) -> list[Problem]:
    """Make one problem of the differences of each tensor, whatever ranks it differs on."""
    by_name: dict[str, list[Difference]] = {}
    for difference in differences:
        by_name.setdefault(difference.output.name, []).append(difference)
    problems = []
    with plan.source.open() as reader:
        for number, (name, of_name) in enumerate(by_name.items()):
            outputs = [output for output in plan.outputs if output.name == name]
            mistake = None
            if number < _MOST_EXPLAINED and _elements(outputs) <= _MOST_ELEMENTS:
                mistake = _find(plan, files, reader, outputs, of_name)
            problems.append(_problem(name, of_name, mistake or _located(of_name)))
    return problems


def explain_quantized(
    plan: Plan, files: RankFiles, comparisons: Iterable[LinearComparison]
) -> list[Problem]:
    """Make one problem of each quantized weight and each weight scale that is wrong."""
    problems: list[Problem] = []
    wrong = [linear for linear in comparisons if linear.differences or linear.wrong_scales]
    with plan.source.open() as reader:
        for number, linear in enumerate(wrong):
            explained = number < _MOST_EXPLAINED and _elements(linear.weights) <= _MOST_ELEMENTS
            problems += _quantized_problems(plan, linear, files, reader if explained else None)
    return problems


def regroup_hint(
    problems: Iterable[Problem], plan: Plan, command: Sequence[str] | None
) -> list[Problem]:
    """Complete the hint for rows grouped by KV head, by a ``command`` where all layers' are."""
    problems = list(problems)
    qkv = {o.name for o in plan.outputs if o.name.endswith("attention.qkv.weight")}
    wrong = {problem.where.rpartition(" ")[2] for problem in problems}
    hint = "convert or quantize again."
    if command is not None and qkv <= wrong:
        hint = f"correct it: {shlex.join(command)}"
    return [
        dataclasses.replace(problem, hint=f"{REGROUP}; {hint}")
        if problem.hint == REGROUP
        else problem
        for problem in problems
    ]


def _problem(name: str, wrong: Iterable[Difference | int], mistake: Mistake) -> Problem:
    ranks = (item if isinstance(item, int) else item.output.rank for item in wrong)
    return Problem(f"rank{ranges(ranks)} {name}", mistake.text, mistake.hint, *place_of(name))


def _elements(outputs: Iterable[Output]) -> int:
    return sum(int(np.prod(output.shape)) for output in outputs)


def _located(differences: Sequence[Difference], text: str = "elements differ") -> Mistake:
    elements = sum(difference.elements for difference in differences)
    size = _elements(difference.output for difference in differences)
    first = differences[0]
    row, column = first.first
    return Mistake(
        f"{elements:,} of {size:,} {text}, first at row {row}, column {column}: "
        f"{first.stored:.5g} instead of {first.expected:.5g}"
    )


# Unquantized tensors, bit for bit


def _find(
    plan: Plan,
    files: RankFiles,
    reader: Reader,
    outputs: Sequence[Output],
    differences: Sequence[Difference],
) -> Mistake | None:
    """Look for the mistake in a tensor; all ranks' are held in memory."""
    if not all(is_comparable(files, output) for output in outputs):
        return None
    expected = [assemble(plan, output, reader) for output in outputs]
    stored = [files[o.rank].read(o.name).reshape(o.matrix) for o in outputs]
    module = outputs[0].name.rpartition(".")[0]
    heads = Heads.of(plan)
    mistake = named_mistake(module, expected, stored, heads, np.array_equal)
    if mistake is not None:
        return mistake
    wrong = {difference.output.rank for difference in differences}
    code = outputs[0].dtype
    values, source_values = (
        np.concatenate(
            [
                float32_values(bits, code).ravel()
                for output, bits in zip(outputs, arrays, strict=True)
                if output.rank in wrong
            ]
        )
        for arrays in (stored, expected)
    )
    return mistake_in_values(values, source_values, code, len(outputs))


def mistake_in_values(values: Float32, expected: Float32, code: str, ranks: int) -> Mistake | None:
    """Name a mistake with the values of a tensor on the ranks where it is wrong."""
    if not np.isfinite(values).all() and np.isfinite(expected).all():
        return Mistake(f"{int((~np.isfinite(values)).sum())} values are not finite")
    if not values.any():
        return Mistake("it is all zero: it was dropped")
    values, expected = values.astype(np.float64), expected.astype(np.float64)
    power = float(expected @ expected)
    slack = 4 * UNIT_ROUNDOFF[code] * np.abs(expected).max(initial=0)
    factor = float(values @ expected) / power if power and len(expected) > 1 else 1.0
    rescaled = np.abs(values - factor * expected).max() <= slack * abs(factor)
    if not rescaled or np.abs(values - expected).max() <= slack:
        return None
    if ranks > 1:
        for value, verb in ((ranks, "multiplied"), (1 / ranks, "divided")):
            if abs(factor / value - 1) < 1e-3:
                return Mistake(f"it is {verb} by the number of ranks; the reader adds it once")
    return Mistake(f"it is scaled by {factor:.6g}")


# Quantized linears, within the tolerance


def _quantized_problems(
    plan: Plan, linear: LinearComparison, files: RankFiles, reader: Reader | None
) -> Iterator[Problem]:
    """Yield the problems of a linear; mistakes are looked for where there is a reader."""
    target, tolerance = linear.target, Tolerance(plan)
    heads = Heads.of(plan)
    if linear.differences:
        mistake = None
        if reader is not None:
            levels, stored = linear.levels(plan, files, reader)
            used = _used_smoother(linear, levels, stored, tolerance)
            if used is not None:
                ranks = [output.rank for output in linear.weights]
                yield _problem(
                    f"{target}.{SMOOTHER}", ranks, _other_smoother(linear, used, tolerance)
                )
                return

            def on_grid(left: Array, right: Array) -> bool:
                return bool(tolerance.weights(left, right).all())

            mistake = named_mistake(target, levels, stored, heads, on_grid)
        text = "elements are more than a step of the grid from the source"
        mistake = mistake or _located(linear.differences, text)
        yield _problem(f"{target}.weight", linear.differences, mistake)
    if linear.wrong_scales:
        mistake = None
        if tolerance.per_channel:

            def is_close(left: Array, right: Array) -> bool:
                return bool((np.abs(left - right) <= tolerance.scales * right).all())

            expected = [linear.scales[o.rank][:, None] for o in linear.weights]
            stored = [linear.stored_scales[o.rank][:, None] for o in linear.weights]
            mistake = named_mistake(target, expected, stored, heads, is_close)
        mistake = mistake or _wrong_scale(linear, tolerance)
        yield _problem(f"{target}.{WEIGHT_SCALE}", linear.wrong_scales, mistake)


def _wrong_scale(linear: LinearComparison, tolerance: Tolerance) -> Mistake:
    with np.errstate(all="ignore"):
        ratios = np.concatenate(
            [linear.stored_scales[rank] / linear.scales[rank] for rank in linear.wrong_scales]
        )
    grid = (
        "the weight is not on the grid of either scale"
        if linear.differences
        else "the weight itself is on the grid of one of the two"
    )
    if np.ptp(ratios) <= 3 * tolerance.scales * abs(ratios[0]):
        value = linear.scales[linear.wrong_scales[0]][0]
        return Mistake(
            f"is {ratios[0]:.3g} times what the source's largest values give ({value:.6g}); {grid}"
        )
    off = np.flatnonzero(~(np.abs(ratios - 1) <= 1e-2))
    row = int(off[0]) if len(off) else 0
    return Mistake(
        f"{len(off)} of {len(ratios)} scales are not what the source's rows give, first at row "
        f"{row}: {ratios[row]:.4g} times that; {grid}"
    )


def _used_smoother(
    linear: LinearComparison, levels: Ranks, stored: Ranks, tolerance: Tolerance
) -> Float32 | None:
    """Return the vector that the weight was smoothed with, if it is not the one in the files.

    The least squares of every column give it, if the weight is the source's: a stored weight times
    its scale is W / s, and ``levels`` times theirs is W over the vector in the files.
    """
    vector = linear.smoother
    if vector is None:
        return None
    products, squares = np.zeros((2, len(vector)))
    parts = []
    with np.errstate(all="ignore"):
        for output, level, weight in zip(linear.weights, levels, stored, strict=True):
            assert isinstance(output.origin, Rows)
            columns = kept_columns(np.arange(len(vector), dtype=np.uint32)[None], output.origin)[0]
            scale = linear.stored_scales[output.rank][:, None]
            source = level * linear.scales[output.rank][:, None] * vector[columns]
            products[columns] += (source * weight * scale).sum(axis=0, dtype=np.float64)
            squares[columns] += np.square(weight * scale, dtype=np.float64).sum(axis=0)
            parts.append((columns, source / scale, weight))
        used = np.where(squares > 0, products / squares, vector).astype(np.float32)
        explained = all(
            tolerance.weights(weight, source / used[columns]).all()
            for columns, source, weight in parts
        )
        same = np.abs(vector / used - 1) <= tolerance.smoother
    return used if explained and not same.all() else None


def _other_smoother(linear: LinearComparison, used: Float32, tolerance: Tolerance) -> Mistake:
    vector = linear.smoother
    assert vector is not None
    with np.errstate(all="ignore"):
        off = np.flatnonzero(~(np.abs(vector / used - 1) <= tolerance.smoother))
        reordered = (np.abs(np.sort(vector) / np.sort(used) - 1) <= tolerance.smoother).all()
    first = int(off[0]) if len(off) else 0
    text = (
        f"is not what the weight was smoothed with: {len(off)} of {len(vector)} entries, first at "
        f"{first}: {vector[first]:.5g} instead of {used[first]:.5g}"
    )
    if not reordered:
        return Mistake(text)
    return Mistake(
        f"{text}; the same entries in another order",
        "it belongs to the columns of the input and is never regrouped with rows.",
    )
