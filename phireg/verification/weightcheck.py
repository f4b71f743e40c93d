"""All tensors of the rank files against the source: bit for bit, or by the grid if quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from phireg.checkpoint.manifest import read_manifest
from phireg.checkpoint.rankfiles import RankFiles
from phireg.errors import SourceError
from phireg.planning.model import Output, Plan, Scale
from phireg.planning.report import ranges
from phireg.planning.schedule import restrict
from phireg.verification.grid import Seen, compare_quantized
from phireg.verification.gridlook import recognise_quantized
from phireg.verification.recognise import place_of, recognise
from phireg.verification.request import Outcome
from phireg.verification.result import Problem
from phireg.verification.scales import activation_problems, cache_problems, rank_problems
from phireg.verification.weights import comparable, compare


def check_weights(plan: Plan, directory: Path, progress: Callable[[int, int], None]) -> Outcome:
    """Compare every tensor of a plan without errors.

    Args:
        plan: of the source.
        directory: the checkpoint.
        progress: told (how many more bytes have been compared, how many there are in all).
    """
    total = sum(output.nbytes for output in plan.outputs)

    def tell(more: int) -> None:
        progress(more, total)

    plain = _unquantized(plan)
    with RankFiles(directory, plan.options.tp_size) as files:
        absent = [output for output in plain.outputs if not comparable(files, output)]
        problems = recognise(plain, files, compare(plain, files, tell))
        seen: list[Seen] = []
        notes: list[str] = []
        if plan.scales:
            found = {
                index: _is_there(files, output)
                for index, output in enumerate(plan.outputs)
                if _quantized(plan, output)
            }
            absent += [plan.outputs[index] for index, is_there in found.items() if not is_there]
            seen = compare_quantized(plan, files, _complete(plan, found), tell)
            scales = {n: ok for n, ok in found.items() if not _weight(plan, plan.outputs[n])}
            tell(sum(plan.outputs[index].nbytes for index in scales))
            problems += recognise_quantized(plan, files, seen)
            problems += rank_problems(plan, files, scales)
            problems += cache_problems(plan, files, scales)
            alpha = _alpha(directory)
            wrong = list(activation_problems(plan, files, scales))
            if alpha == 1:
                problems += wrong
            elif alpha is None:
                notes += [f"{problem} (or it was smoothed with another alpha)" for problem in wrong]
            notes += _twice_rounded(seen)
    problems += [
        Problem(
            f"rank{output.rank} {output.name}",
            "is missing or of another shape or dtype than planned",
            None,
            *place_of(output.name),
        )
        for output in absent
    ]
    return _summary(plan, plain, len(absent), seen), problems, notes


def _unquantized(plan: Plan) -> Plan:
    """The part of the plan that is bit for bit the source's."""
    return restrict(plan, lambda output: not _quantized(plan, output)) if plan.scales else plan


def _quantized(plan: Plan, output: Output) -> bool:
    return _weight(plan, output) or isinstance(output.origin, Scale)


def _weight(plan: Plan, output: Output) -> bool:
    return output.name in {f"{linear.target}.weight" for linear in plan.linears}


def _is_there(files: RankFiles, output: Output) -> bool:
    """Whether it can be read; early exporters wrote e4m3 as int8, some write scalars for [1]."""
    kind = files.kind(output.rank, output.name)
    codes = (output.dtype, "I8") if output.dtype == "F8_E4M3" else (output.dtype,)
    shapes = (output.shape, ()) if output.shape == (1,) else (output.shape,)
    return kind is not None and kind[0] in codes and kind[1] in shapes


def _complete(plan: Plan, found: Mapping[int, bool]) -> dict[str, bool]:
    """By linear, whether all of its tensors are there on all ranks."""
    complete = {linear.target: True for linear in plan.linears}
    for index, is_there in found.items():
        target = plan.outputs[index].name.rpartition(".")[0]
        if target in complete:
            complete[target] = complete[target] and is_there
    return complete


def _alpha(directory: Path) -> float | None:
    """SmoothQuant's alpha, if whoever quantized it says so."""
    try:
        manifest = read_manifest(directory) or {}
    except SourceError:
        return None
    quantization = manifest.get("quantization")
    alpha = quantization.get("alpha") if isinstance(quantization, Mapping) else None
    return float(alpha) if isinstance(alpha, (int, float)) else None


def _twice_rounded(seen: Sequence[Seen]) -> list[str]:
    layers = [place_of(one.linear.target)[0] for one in seen if one.twice]
    if not layers:
        return []
    numbers = ranges(layer for layer in layers if layer is not None)
    return [
        f"layers {numbers}: smoothed weights were rounded once more than needed, as exporters "
        "before modelopt 0.23 do"
    ]


def _summary(plan: Plan, plain: Plan, absent: int, seen: Sequence[Seen]) -> str:
    how = f"{plan.casts} source tensors cast" if plan.casts else "nothing was cast"
    if not plan.scales:
        count = len(plan.outputs)
        return f"{count - absent} of {count} tensors compared bit for bit; {how}"
    scheme = plan.options.scheme
    quantized = (
        f"{len(seen)} linears within a step of the {scheme.quant_algo} grid and scales recomputed"
        if scheme is not None and plan.linears
        else "scales of the KV cache looked at"
    )
    return f"{len(plain.outputs)} tensors compared bit for bit; {how}; {quantized}"
