"""The ``quantization`` block of config.json: which linears, which weights, which cache."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from phireg.reader.fields import Config

WeightScheme: TypeAlias = Literal["fp8", "int8_sq", "int8_wo", "int4_wo"]
Grid: TypeAlias = Literal["fp8", "int8"]

# The linears of a layer: all of them are quantized, or none. A row linear's inputs are split over
# the ranks, a column linear's outputs.
ROW_LINEARS = ("attention.dense", "mlp.proj")
LINEARS = ("attention.qkv", "mlp.fc", *ROW_LINEARS)

_WEIGHTS: dict[str, WeightScheme] = {
    "FP8": "fp8",
    "W8A8_SQ_PER_CHANNEL": "int8_sq",
    "W8A16": "int8_wo",
    "W4A16": "int4_wo",
}
_CACHES: dict[str, Grid] = {"FP8": "fp8", "INT8": "int8"}
# What the block may say besides the algorithms, and the values that change nothing under the ones
# above. The reader's default of group_size is 128; only its grouped algorithms look at it.
_INERT = {
    "group_size": (None, 0, 128),
    "has_zero_point": (None, False),
    "pre_quant_scale": (None, False),
    "clamp_val": (None,),
    "use_meta_recipe": (None, False),
}
_KNOWN = {"quant_algo", "kv_cache_quant_algo", "exclude_modules", "smoothquant_val", *_INERT}


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is quantized; lm_head, the embedding and norms never are.

    Attributes:
        weights: of the linears of every layer: "fp8" (e4m3 weights and inputs), "int8_sq"
            (SmoothQuant: int8 weights and inputs), "int8_wo" and "int4_wo" (weights only), or
            None.
        kv_cache: the grid that keys and values are stored on, or None.
    """

    weights: WeightScheme | None = None
    kv_cache: Grid | None = None


def parse_quantization(config: Config, num_layers: int) -> Quantization:
    """Read the block of a checkpoint of ``num_layers`` layers.

    Raises:
        CheckError: an algorithm or a setting the executor has no exact arithmetic for.
    """
    block = config.block("quantization")
    weights = _word(block, "quant_algo", _WEIGHTS)
    kv_cache = _word(block, "kv_cache_quant_algo", _CACHES)
    if weights is not None:
        _check_settings(block)
        _check_excluded(block, num_layers)
    return Quantization(weights, kv_cache)


def _word(block: Config, key: str, known: dict[str, Any]) -> Any:
    value = block.values.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or value not in known:
        raise block.fail(
            f"{key} {value!r} is unknown to the executor", f"it runs {', '.join(known)}"
        )
    return known[value]


def _check_settings(block: Config) -> None:
    for key, value in block.values.items():
        if key not in _KNOWN:
            raise block.fail(f"{key} is unknown to the executor")
        if key in _INERT and value not in _INERT[key]:
            raise block.fail(f"{key} is {value!r}: {block.get('quant_algo')} has no such feature")


def _check_excluded(block: Config, num_layers: int) -> None:
    """TensorRT-LLM matches patterns with full names; before 0.11, names with the last part."""
    patterns = block.values.get("exclude_modules") or []
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise block.fail(f"exclude_modules is {patterns!r}, not a list of module names")
    for layer in range(num_layers):
        for linear in LINEARS:
            name = f"transformer.layers.{layer}.{linear}"
            for pattern in patterns:
                if fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern:
                    raise block.fail(
                        f"exclude_modules has {pattern!r}, which leaves {name} unquantized",
                        "the executor runs checkpoints that quantize every linear of every layer",
                    )
    # An empty list is the reader's own, which has lm_head; any other replaces that.
    if patterns and not any(fnmatchcase("lm_head", pattern) for pattern in patterns):
        raise block.fail(
            "exclude_modules has no lm_head, so TensorRT-LLM would quantize it",
            "the executor runs checkpoints whose lm_head is not quantized",
        )
