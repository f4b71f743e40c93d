"""The scales of a plan, computed and checked before anything is written.

Activation maxima come from calibration; weight maxima from reading every quantized weight once, in
the checkpoint's dtype and a block at a time (twice for SmoothQuant with alpha below 1, whose
smoothing needs the columns' maxima first). Scales are in the source's coordinates: the plan maps
them to ranks and fused modules as it maps the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import xxhash

from phireg.calibration.statistics import Statistics
from phireg.conversion.cast import Bits, Float32, cast, one_thread_each
from phireg.conversion.linear_scales import LinearScaler
from phireg.conversion.quantizer import CPU, Scales
from phireg.conversion.stream import WORKERS, Progress, collect, share
from phireg.dtypes import BITS, E4M3_MAX, INT8_MAX, SMALLEST_NORMAL, as_torch
from phireg.errors import PlanError
from phireg.findings import Finding, Severity
from phireg.planning.model import Plan
from phireg.planning.report import problems
from phireg.targets.target import KEY_SCALE, KV_SCALE, VALUE_SCALE

_NOTHING: Mapping[str, int] = {}
_NO_INPUTS = np.zeros(0, np.float32)


def compute_scales(
    plan: Plan,
    statistics: Statistics,
    *,
    alpha: float = 1.0,
    device: str = CPU,
    progress: Progress | None = None,
) -> Scales:
    """Compute every scale of a plan without errors; the maxima of fused modules are joined.

    ``progress`` takes the number of further source bytes read, in all :func:`bytes_read`. A
    PlanError names all scales that are missing or unusable, at once.
    """
    inputs, idle = statistics.of_experts()
    maxima = _input_maxima(plan, statistics, inputs) if plan.options.calibrated else {}
    workers, block_bytes = share(device, WORKERS)
    stop, tell = Event(), progress or (lambda count: None)
    with plan.source.open() as reader, one_thread_each(workers):
        given = (plan, reader, statistics, alpha, device, block_bytes, tell, stop)
        scalers = [LinearScaler(*given, x, maxima.get(x.target, _NO_INPUTS)) for x in plan.linears]
        with ThreadPoolExecutor(workers) as pool:
            try:
                results = collect([pool.submit(scaler.compute) for scaler in scalers])
            except BaseException:
                stop.set()
                raise
    values: dict[str, Bits] = {}
    overflowed: dict[str, int] = {}
    for scales in results:
        values.update(scales.values)
        overflowed.update(scales.overflowed)
    values.update(_kv_scales(plan, statistics))
    check_scales(plan, values, overflowed)
    return Scales(
        values,
        {x.target: x.inverse for x in results if x.inverse is not None},
        {module: rows for x in results for module, rows in x.rows.items()},
        (*_unseen(maxima, statistics, plan), *_idle_experts(plan, idle)),
    )


def _unseen(
    maxima: Mapping[str, Float32], statistics: Statistics, plan: Plan
) -> tuple[Finding, ...]:
    """Warn of what calibration saw only zeros of: a layer that is switched off, perhaps."""
    names = [target for target, amax in maxima.items() if not amax.any()]
    if plan.options.kv_cache_dtype == "int8":
        kept = zip(plan.kv_caches, statistics.keys, statistics.values, strict=True)
        names += [module for module, *largest in kept if not any(largest)]
    detail = "calibration saw only zeros of it, so its scale is 1; is the layer switched off?"
    return tuple(Finding(Severity.WARNING, "unseen", name, detail) for name in names)


def _idle_experts(plan: Plan, idle: Collection[str]) -> Iterator[Finding]:
    """Warn of experts that no token of the calibration was sent to."""
    modules = [module for linear in plan.linears for module in linear.sources if module in idle]
    detail = (
        "no calibration token was sent to this expert, so its inputs are taken to be like those of "
        "the layer's other experts: calibrate with more text"
    )
    for expert in dict.fromkeys(module.rpartition(".")[0] for module in modules):
        yield Finding(Severity.WARNING, "unseen", expert, detail)


def bytes_read(plan: Plan, alpha: float = 1.0) -> int:
    """Source bytes that :func:`compute_scales` reads."""
    sizes = {
        linear.target: sum(plan.source.tensors[f"{m}.weight"].nbytes for m in linear.sources)
        for linear in plan.linears
    }
    form = plan.options.format
    total = (1 + (plan.smoothed and alpha < 1)) * sum(sizes.values())
    if form is None or form.levels == 1:
        return total
    # The scale of a whole weight comes first, of all weights that have the same.
    alike = sum(sizes[name] for x in plan.linears for name in x.alike or (x.target,))
    if form.weight == "e2m1":
        return total + alike
    return sum(
        sum(sizes[name] for name in x.alike) if x.folded else sizes[x.target] for x in plan.linears
    )


def statistics_digest(statistics: Statistics) -> str:
    """xxh3_128 of names, float32 maxima and AWQ's factors."""
    hashed = xxhash.xxh3_128()
    for name in sorted(statistics.inputs):
        hashed.update(name.encode() + b"\0" + statistics.inputs[name].tobytes())
    for name in sorted(statistics.awq):
        hashed.update(b"awq " + name.encode() + b"\0" + statistics.awq[name].tobytes())
    for maxima in (statistics.keys, statistics.values):
        hashed.update(np.array(maxima, np.float32).tobytes())
    return hashed.hexdigest()


def check_scales(
    plan: Plan, values: Mapping[str, Bits], overflowed: Mapping[str, int] = _NOTHING
) -> None:
    """Raise a PlanError with all scales that are missing, or that no engine could work with."""
    defects = [
        _finding(name, f"{count} finite values do not fit into {plan.options.dtype}")
        for name, count in overflowed.items()
    ]
    for name, scale in plan.scales.items():
        if name not in values:
            defects.append(_finding(name, "is missing"))
            continue
        if scale.dtype == "I64":
            continue  # a shape
        count = len(values[name])
        for detail, number in _defects(values[name], scale.dtype):
            times = f" ({number} of {count} values)" if count > 1 else ""
            defects.append(_finding(name, detail + times))
    if defects:
        raise PlanError(
            f"{len(defects)} tensors cannot be quantized; nothing was written\n{problems(defects)}",
            hint="if the weights are sound, calibrate with more text, or choose another --dtype: "
            "bfloat16 and float32 hold a wider range than float16.",
        )


def _defects(bits: Bits, code: str) -> Iterator[tuple[str, int]]:
    value = as_torch(bits, code).float().numpy()
    normal = SMALLEST_NORMAL.get(code, 0.0)  # an e4m3 scale may be below its normal numbers
    for detail, wrong in (
        ("is not a number", np.isnan(value)),
        ("is infinite", np.isinf(value)),
        ("is zero", value == 0),
        ("is negative", np.isfinite(value) & (value < 0)),
        (f"is denormal in {code} (below {normal:.2g})", (value > 0) & (value < normal)),
    ):
        if wrong.any():
            yield detail, int(wrong.sum())


def _finding(subject: str, detail: str, code: str = "scale") -> Finding:
    return Finding(Severity.ERROR, code, subject, detail)


def _input_maxima(
    plan: Plan, statistics: Statistics, inputs: Mapping[str, Float32]
) -> dict[str, Float32]:
    """Per target the maxima of its input channels; all that are missing are named at once."""
    missing: list[Finding] = []
    maxima: dict[str, Float32] = {}
    for linear in plan.linears:
        for module in linear.sources:
            amax = inputs.get(module)
            if amax is None:
                detail = f"no input maxima, needed by {linear.target}"
                missing.append(_finding(module, detail, "calibrate"))
            elif amax.shape != (linear.columns,):
                detail = f"{len(amax)} input channels, the weight has {linear.columns}"
                missing.append(_finding(module, detail, "calibrate"))
            elif plan.options.searched and module not in statistics.awq:
                missing.append(_finding(module, "no factors of AWQ", "calibrate"))
            else:
                before = maxima.get(linear.target)
                maxima[linear.target] = amax if before is None else np.maximum(before, amax)
    layers = len(statistics.keys)
    if plan.kv_caches and layers != len(plan.kv_caches):
        recorded = f"keys and values of {layers} layers" if layers else "no keys and values"
        detail = f"{recorded}, the model has {len(plan.kv_caches)} layers"
        missing.append(_finding("KV cache", detail, "calibrate"))
    if missing:
        raise PlanError(
            f"the calibration statistics are not of this model; nothing was written\n"
            f"{problems(missing)}",
            hint="calibrate the model that is quantized, in this format and with its KV cache.",
        )
    return maxima


def _kv_scales(plan: Plan, statistics: Statistics) -> dict[str, Bits]:
    """INT8: maximum / 127. FP8: maximum / 448; at least 1 where keys and values share one.

    Such a one is TensorRT-LLM's: releases before 0.13 take 1 for FP8 and ignore the tensor, and
    e4m3 loses nothing with 1 as long as no value is beyond 448.
    """
    scales: dict[str, Bits] = {}
    int8 = plan.options.kv_cache_dtype == "int8"
    for layer, module in enumerate(plan.kv_caches):
        keys, values = (np.float32(x[layer]) for x in (statistics.keys, statistics.values))
        for companion, largest in (
            (KV_SCALE, np.maximum(keys, values)),
            (KEY_SCALE, keys),
            (VALUE_SCALE, values),
        ):
            if (name := f"{module}.{companion}") not in plan.scales:
                continue
            scale = np.array([largest], np.float32) / np.float32(INT8_MAX if int8 else E4M3_MAX)
            if companion == KV_SCALE and not int8:
                scale = np.maximum(np.float32(1), scale)
            elif not largest:
                scale = np.ones(1, np.float32)
            code, bits = plan.scales[name].dtype, scale.view(BITS["F32"])
            scales[name] = cast(bits, "F32", code)[0]
    return scales
