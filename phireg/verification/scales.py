"""Scales as numbers: which of them no engine could work with, and which ranks disagree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Float32
from phireg.dtypes import SMALLEST_NORMAL, UNIT_ROUNDOFF, WEIGHT_DTYPES, float32_values
from phireg.planning.model import Output, Plan
from phireg.planning.report import ranges
from phireg.verification.recognise import place_of
from phireg.verification.result import Problem

_SUFFIX = "_scaling_factor"
_CACHE, _KEY, _VALUE = (f"{what}_cache{_SUFFIX}" for what in ("kv", "k", "v"))


def value_problems(files: RankFiles) -> Iterator[Problem]:
    """Scales of any rank that are zero, negative, infinite, not a number or denormal."""
    for rank, file in files.items():
        for name, entry in file.header.entries.items():
            if not name.endswith(_SUFFIX) or entry.dtype not in WEIGHT_DTYPES.values():
                continue
            value = read_scale(files, rank, name)
            for what, wrong in _defects(value, SMALLEST_NORMAL[entry.dtype]):
                many = f" ({wrong} of {value.size} values)" if value.size > 1 else ""
                where = f"rank{rank}.safetensors: {name}"
                yield Problem(where, f"{what}{many}: no scale", None, *place_of(name))


def read_scale(files: RankFiles, rank: int, name: str) -> Float32:
    """A whole scale in float32; one without dimensions has one element."""
    file = files[rank]
    return float32_values(file.read(name), file.header.entries[name].dtype)


def _defects(value: Float32, normal: float) -> Iterator[tuple[str, int]]:
    for what, wrong in (
        ("is not a number", np.isnan(value)),
        ("is infinite", np.isinf(value)),
        ("is zero", value == 0),
        ("is negative", np.isfinite(value) & (value < 0)),
        ("is denormal", (value > 0) & (value < normal)),
    ):
        if wrong.any():
            yield what, int(wrong.sum())


def rank_problems(plan: Plan, files: RankFiles, there: Mapping[int, bool]) -> Iterator[Problem]:
    """Scales that every rank must repeat and some rank has other values of.

    Args:
        plan: a quantized plan.
        files: the rank files.
        there: by index of the output, for the plan's scales: whether it can be read.
    """
    same: dict[tuple[object, ...], list[Output]] = {}
    for index, is_there in there.items():
        output = plan.outputs[index]
        if is_there:
            same.setdefault((output.name, output.origin), []).append(output)
    for outputs in same.values():
        name = outputs[0].name
        values = [read_scale(files, output.rank, name) for output in outputs]
        others = [
            (output.rank, value)
            for output, value in zip(outputs, values, strict=True)
            if not np.array_equal(value, values[0], equal_nan=True)
        ]
        if others:
            text = f"is {_shown(values[0])} on rank {outputs[0].rank} and {_shown(others[0][1])} "
            text += f"on rank {others[0][0]}; every rank must hold the same"
            where = f"rank{ranges(rank for rank, _ in others)} {name}"
            yield Problem(where, text, None, *place_of(name))


def cache_problems(plan: Plan, files: RankFiles, there: Mapping[int, bool]) -> Iterator[Problem]:
    """KV cache scales that are not the larger one of the keys' and the values', if those are there.

    Arguments are those of :func:`rank_problems`.
    """
    for index, is_there in there.items():
        rank, name = plan.outputs[index].rank, plan.outputs[index].name
        if not is_there or not name.endswith(_CACHE):
            continue
        parts = [name.replace(_CACHE, part) for part in (_KEY, _VALUE)]
        if any(files.kind(rank, part) is None for part in parts):
            continue
        key, value = (read_scale(files, rank, part) for part in parts)
        scale = read_scale(files, rank, name)
        if not np.isclose(scale, np.maximum(key, value), rtol=1e-6).all():
            text = f"is {_shown(scale)}; keys have {_shown(key)} and values {_shown(value)}, and "
            text += "the larger one is wanted"
            yield Problem(f"rank{rank} {name}", text, None, *place_of(name))


def _shown(value: Float32) -> str:
    flat = value.ravel()
    return f"{flat[0]:.6g}" if flat.size == 1 else f"[{flat[0]:.6g}, ...]"


def activation_problems(
    plan: Plan, files: RankFiles, there: Mapping[int, bool]
) -> Iterator[Problem]:
    """Activation scales that do not follow from the smoothing vector, as they do with alpha 1.

    The vector is 1 / amax then, so that every smoothed channel reaches 1 and the scale is 1 / 127;
    unless channels were so small or large that their entries were clamped to 1e4 or 1e-4.

    Arguments are those of :func:`rank_problems`.
    """
    names = {plan.outputs[index].name for index, is_there in there.items() if is_there}
    for linear in plan.linears:
        name = f"{linear.target}.activation{_SUFFIX}"
        smoother = f"{linear.target}.prequant{_SUFFIX}"
        if not {name, smoother} <= names:
            continue
        scale = read_scale(files, 0, name)
        ranks = range(plan.options.tp_size)
        vector = np.concatenate([read_scale(files, rank, smoother) for rank in ranks])
        slack = 2 * UNIT_ROUNDOFF[WEIGHT_DTYPES[plan.options.dtype]] + 1e-6
        clamped = (vector <= 1e-4 * (1 + slack)) | (vector >= 1e4 * (1 - slack))
        off = np.abs(scale * 127 - 1) > slack
        if off.any() and not clamped.any():
            text = f"is {_shown(scale * 127)} times 1/127, which it is where inputs are smoothed"
            yield Problem(f"rank0 {name}", f"{text} with alpha 1", None, *place_of(name))
