"""The check of all tensors: bit for bit, or by the grid where they are quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from phireg.checkpoint.rankfiles import RankFiles
from phireg.planning.model import Output, Plan, Scale
from phireg.planning.report import ranges
from phireg.planning.schedule import restrict
from phireg.verification.comparison import compare, is_comparable
from phireg.verification.mistakes import explain, explain_quantized
from phireg.verification.quantized import (
    LinearComparison,
    activation_problems,
    cache_problems,
    compare_quantized,
    rank_problems,
)
from phireg.verification.result import Outcome, Problem, place_of


def check_weights(
    plan: Plan, files: RankFiles, alpha: float | None, progress: Callable[[int, int], None]
) -> Outcome:
    """Compare every tensor of a plan without errors."""
    total = sum(output.nbytes for output in plan.outputs)

    def report(more: int) -> None:
        progress(more, total)

    quantized_weights = {f"{linear.target}.weight" for linear in plan.linears}

    def is_quantized(output: Output) -> bool:
        return output.name in quantized_weights or isinstance(output.origin, Scale)

    plain = restrict(plan, lambda output: not is_quantized(output)) if plan.scales else plan
    absent = [output for output in plain.outputs if not is_comparable(files, output)]
    problems = explain(plain, files, compare(plain, files, report))
    notes: list[str] = []
    comparisons: list[LinearComparison] = []
    if plan.scales:
        quantized = [output for output in plan.outputs if is_quantized(output)]
        missing = [output for output in quantized if not _is_readable(files, output)]
        absent += missing
        incomplete = {output.name.rpartition(".")[0] for output in missing}
        linears = [linear for linear in plan.linears if linear.target not in incomplete]
        comparisons = compare_quantized(plan, files, linears, report)
        scales = [output for output in quantized if isinstance(output.origin, Scale)]
        report(sum(output.nbytes for output in scales))
        scales = [output for output in scales if _is_readable(files, output)]
        problems += explain_quantized(plan, files, comparisons)
        problems += rank_problems(files, scales)
        problems += cache_problems(files, scales)
        deviating = list(activation_problems(plan, files, scales))
        if alpha == 1:
            problems += deviating
        elif alpha is None:
            notes += [f"{text} (or it was smoothed with another alpha)" for text in deviating]
        notes += _rounding_notes(comparisons)
    problems += [
        Problem(
            f"rank{output.rank} {output.name}",
            "is missing or of another shape or dtype than planned",
            None,
            *place_of(output.name),
        )
        for output in absent
    ]
    return _summary(plan, plain, len(absent), comparisons), problems, notes


def _is_readable(files: RankFiles, output: Output) -> bool:
    """Return True for e4m3 stored as int8 (early exporters) and scalars for [1], too."""
    kind = files.kind(output.rank, output.name)
    codes = (output.dtype, "I8") if output.dtype == "F8_E4M3" else (output.dtype,)
    shapes = (output.shape, ()) if output.shape == (1,) else (output.shape,)
    return kind is not None and kind[0] in codes and kind[1] in shapes


def _rounding_notes(comparisons: Sequence[LinearComparison]) -> list[str]:
    places = [place_of(linear.target) for linear in comparisons if linear.rounded_twice]
    if not places:
        return []
    numbers = ranges(layer for layer, _ in places if layer is not None)
    return [
        f"layers {numbers}: smoothed weights were rounded once more than needed, as exporters "
        "before modelopt 0.23 do"
    ]


def _summary(plan: Plan, plain: Plan, absent: int, comparisons: Sequence[LinearComparison]) -> str:
    casts = f"{plan.casts} source tensors cast" if plan.casts else "nothing was cast"
    if not plan.scales:
        count = len(plan.outputs)
        return f"{count - absent} of {count} tensors compared bit for bit; {casts}"
    scheme = plan.options.scheme
    quantized = (
        f"{len(comparisons)} linears within a step of the {scheme.quant_algo} grid and scales "
        "recomputed"
        if scheme is not None and plan.linears
        else "scales of the KV cache looked at"
    )
    return f"{len(plain.outputs)} tensors compared bit for bit; {casts}; {quantized}"
