"""Quantized tensors and their scales in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phireg.cli.output import counted, dtype_name, size

if TYPE_CHECKING:
    from phireg.planning.model import Output, Plan

_ENDS = {"fp8": "448", "int8": "127", "int8_sq": "127"}
"""The largest quantized value, by ``--qformat`` and ``--kv-cache-dtype``."""


def format_text(plan: Plan) -> str:
    """``FP8, 128 linears, the rest bfloat16; FP8 KV cache``."""
    from phireg.reader.schemes import KV_CACHES

    scheme, cache = plan.options.scheme, plan.options.kv_cache_dtype
    assert scheme is not None
    if scheme.weight is None:
        linears = f"{plan.options.dtype} weights, which TensorRT-LLM's builder quantizes"
    else:
        linears = f"{counted(len(plan.linears), 'linear')}, the rest {plan.options.dtype}"
    text = f"{scheme.quant_algo}, {linears}"
    return f"{text}; {KV_CACHES[cache]} KV cache" if cache else text


def scale_rows(plan: Plan) -> list[tuple[str, str]]:
    """A row of the plan's summary for each kind of scale, and what they take."""
    from phireg.planning.model import Basis
    from phireg.reader.schemes import KV_SCALE

    if not plan.scales:
        return []
    words = {
        (Basis.CALIBRATION,): "from calibration",
        (Basis.WEIGHTS,): "from the weights",
        (Basis.CALIBRATION, Basis.WEIGHTS): "from calibration and the weights",
    }
    origins = {name.rpartition(".")[2]: scale.computed_from for name, scale in plan.scales.items()}
    texts = []
    for companion, origin in origins.items():
        count = len(plan.kv_caches) if companion == KV_SCALE else len(plan.linears)
        owner = "attention module" if companion == KV_SCALE else "linear"
        texts.append(f"{companion} of {counted(count, owner)}, {words[origin]}")
    labels = ["scales", *[""] * (len(texts) - 1)]
    how = "calibration: quantize does it, or takes statistics of an earlier one (--calib-stats)"
    needs = [("needs", how)] if plan.options.calibrated else []
    return [*zip(labels, texts, strict=True), *needs]


def pass_text(plan: Plan) -> str:
    """How much is read for the scales before anything is written; empty if nothing is."""
    from phireg.conversion.scales import bytes_read

    if not plan.linears:
        return ""
    twice = " (twice with --alpha below 1)" if _smoothed(plan) else ""
    return f" to be written, and {size(bytes_read(plan))} before that for the scales{twice}"


def scale_text(plan: Plan, name: str) -> str:
    """How a scale will be computed."""
    from phireg.reader.schemes import KV_SCALE

    owner, _, companion = name.rpartition(".")
    options = plan.options
    if companion == KV_SCALE:
        end = _ENDS[options.kv_cache_dtype or ""]
        least = ", but at least 1" if options.kv_cache_dtype == "fp8" else ""
        return f"from calibration: the largest absolute key or value of the layer / {end}{least}"
    end = _ENDS[options.qformat or ""]
    modules = next((x.sources for x in plan.linears if x.target == owner), (owner,))
    if companion == "prequant_scaling_factor":
        return (
            f"from calibration, for each input channel of {_listed(modules)}: 1 / its largest "
            "absolute value; with --alpha below 1 from the weights as well"
        )
    if companion == "activation_scaling_factor":
        smoothed = ", after prequant_scaling_factor," if _smoothed(plan) else ""
        return (
            f"from calibration: the largest absolute input of {_listed(modules)}{smoothed} / {end}"
        )
    weights = _listed([f"{module}.weight" for module in modules])
    if _smoothed(plan):
        return (
            f"for each row of {weights}: its largest absolute value, after division by "
            f"prequant_scaling_factor, / {end}"
        )
    return f"from the weights: the largest absolute value in {weights} / {end}"


def quantized_text(plan: Plan, output: Output) -> str:
    """What happens to the values of a quantized weight; empty for any other tensor."""
    target, _, companion = output.name.rpartition(".")
    if companion != "weight" or target not in {linear.target for linear in plan.linears}:
        return ""
    divided = "divided by weights_scaling_factor"
    if _smoothed(plan):
        divided = (
            "each column divided by its prequant_scaling_factor and each row by its "
            "weights_scaling_factor"
        )
    rounded = f"rounded to {dtype_name(output.dtype)}"
    return f"quantized: cast to {plan.options.dtype}, {divided}, {rounded}"


def _smoothed(plan: Plan) -> bool:
    scheme = plan.options.scheme
    return scheme is not None and "prequant_scaling_factor" in scheme.companions


def _listed(names: list[str] | tuple[str, ...]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
