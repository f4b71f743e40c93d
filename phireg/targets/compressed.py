"""compressed-tensors' layout of quantized Hugging Face directories, as its 0.20 writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phireg.formats import WEIGHT_BITS, Format, Grid
from phireg.targets.huggingface import HuggingFace
from phireg.targets.target import (
    INPUT_SCALE,
    KEY_SCALE,
    SECOND_SCALE,
    SHAPE,
    VALUE_SCALE,
    WEIGHT_SCALE,
    Layout,
    Stored,
    WrittenModel,
)

_CHANNELS = {WEIGHT_SCALE: Stored("weight_scale", None, "column")}
_WORDS = Layout(
    "pack-quantized",
    "I32",
    {WEIGHT_SCALE: Stored("weight_scale", None), SHAPE: Stored("weight_shape", "I64")},
    "words",
    "weight_packed",
)
_LAYOUTS = {
    "fp8": Layout(
        "float-quantized",
        "F8_E4M3",
        {WEIGHT_SCALE: Stored("weight_scale", None), INPUT_SCALE: Stored("input_scale", None)},
    ),
    "fp8_dynamic": Layout("float-quantized", "F8_E4M3", _CHANNELS),
    "w8a8": Layout("int-quantized", "I8", _CHANNELS),
    "w4a16": _WORDS,
    "int4_awq": _WORDS,
    "nvfp4": Layout(
        "nvfp4-pack-quantized",
        "U8",
        {
            WEIGHT_SCALE: Stored("weight_scale", "F8_E4M3"),
            SECOND_SCALE: Stored("weight_global_scale", divides=True),
            INPUT_SCALE: Stored("input_global_scale", divides=True),
        },
        "columns",
        "weight_packed",
    ),
}
_KV_CACHES = {"fp8": {KEY_SCALE: Stored("k_scale", None), VALUE_SCALE: Stored("v_scale", None)}}
_VERSION = "0.20.1"
"""The release of compressed-tensors whose layout this is."""


def _levels(
    grid: Grid, strategy: str, *, dynamic: bool | str = False, group_size: int | None = None
) -> dict[str, Any]:
    levels = {
        "dynamic": dynamic,
        "group_size": group_size,
        "num_bits": WEIGHT_BITS[grid],
        "strategy": strategy,
        "symmetric": True,
        "type": "float" if grid in ("e4m3", "e2m1") else "int",
    }
    if grid == "e2m1":
        levels |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    return levels


def _group(form: Format, layout: Layout) -> dict[str, Any]:
    """Return the settings of the linears, as ``config_groups`` has them."""
    inputs = None
    if form.inputs is not None:
        by = form.inputs.scale
        dynamic = "local" if by == "group" else by == "token"
        size = form.group_size if by == "group" else None
        inputs = _levels(form.inputs.grid, by, dynamic=dynamic, group_size=size)
        if form.inputs.scale != "token":
            inputs["observer"] = "static_minmax"
    return {
        "format": layout.algorithm,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _levels(form.weight, form.per, group_size=form.group_size),
    }


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(HuggingFace):
    """Directories with ``quant_method`` "compressed-tensors"."""

    def config_files(self, model: WrittenModel) -> dict[str, dict[str, Any]]:
        """Return config.json with its quantization block."""
        files = super().config_files(model)
        if (quantized := model.quantized) is None:
            return files
        # The embedding is no linear.
        ignored = [name for name in quantized.excluded if not name.endswith("embed_tokens")]
        cache = _levels("e4m3", "tensor")
        files["config.json"]["quantization_config"] = {
            "config_groups": {"group_0": _group(quantized.format, quantized.layout)},
            "format": quantized.layout.algorithm,
            "global_compression_ratio": None,
            "ignore": ignored,
            "kv_cache_scheme": cache if quantized.kv_cache else None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": _VERSION,
        }
        return files


TARGET = CompressedTensors(
    name="hf-compressed-tensors",
    summary="compressed-tensors' quantized Hugging Face layout",
    api=1,
    layouts=_LAYOUTS,
    kv_caches=_KV_CACHES,
    folds="all",
)
