"""ModelOpt's unified Hugging Face layout, as its ``export_hf_checkpoint`` of 0.47 writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phireg.files.kinds import producer
from phireg.targets.huggingface import HuggingFace
from phireg.targets.target import (
    INPUT_SCALE,
    KEY_SCALE,
    PRE_SCALE,
    SECOND_SCALE,
    VALUE_SCALE,
    WEIGHT_SCALE,
    Layout,
    Stored,
    WrittenModel,
)
from phireg.targets.trtllm import quantization_block

_SCALAR = Stored("input_scale", shape="scalar")
_PRE_SCALE = Stored("pre_quant_scale", None)
_SECOND = Stored("weight_scale_2", shape="scalar")
_LAYOUTS = {
    "fp8": Layout(
        "FP8",
        "F8_E4M3",
        {WEIGHT_SCALE: Stored("weight_scale", shape="scalar"), INPUT_SCALE: _SCALAR},
    ),
    "int8_sq": Layout(
        "W8A8_SQ_PER_CHANNEL",
        "I8",
        {WEIGHT_SCALE: Stored("weight_scale"), INPUT_SCALE: _SCALAR, PRE_SCALE: _PRE_SCALE},
    ),
    "fp8_pc_pt": Layout(
        "FP8_PER_CHANNEL_PER_TOKEN", "F8_E4M3", {WEIGHT_SCALE: Stored("weight_scale")}
    ),
    "int8_wo": Layout("W8A16", "I8", {WEIGHT_SCALE: Stored("weight_scale")}),
    "int4_awq": Layout(
        "W4A16_AWQ", "U8", {WEIGHT_SCALE: Stored("weight_scale"), PRE_SCALE: _PRE_SCALE}, "rows"
    ),
    "w4a8_awq": Layout(
        "W4A8_AWQ",
        "U8",
        {
            WEIGHT_SCALE: Stored("weight_scale"),
            SECOND_SCALE: _SECOND,
            INPUT_SCALE: _SCALAR,
            PRE_SCALE: _PRE_SCALE,
        },
        "rows",
    ),
    "nvfp4": Layout(
        "NVFP4",
        "U8",
        {
            WEIGHT_SCALE: Stored("weight_scale", "F8_E4M3"),
            SECOND_SCALE: _SECOND,
            INPUT_SCALE: _SCALAR,
        },
        "columns",
    ),
}
_KV_CACHES = {
    "fp8": {
        KEY_SCALE: Stored("k_proj.k_scale", shape="scalar"),
        VALUE_SCALE: Stored("v_proj.v_scale", shape="scalar"),
    }
}


@dataclass(frozen=True, kw_only=True)
class ModelOpt(HuggingFace):
    """Directories with ``hf_quant_config.json`` and ``quant_method`` "modelopt"."""

    def config_files(self, model: WrittenModel) -> dict[str, dict[str, Any]]:
        """Return config.json with its quantization block, and the sidecar with the same facts."""
        files = super().config_files(model)
        if (quantized := model.quantized) is None:
            return files
        facts, by = quantization_block(quantized), {"producer": producer()}
        files["hf_quant_config.json"] = {**by, "quantization": facts}
        eight: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
        four = {**eight, "num_bits": 4, "group_size": quantized.format.group_size}
        levels = {"fp8": eight, "nvfp4": four}.get(quantized.format.name)
        group = {"input_activations": levels, "weights": levels, "targets": ["Linear"]}
        files["config.json"]["quantization_config"] = {
            **({"config_groups": {"group_0": group}} if levels else {}),
            "ignore": facts["exclude_modules"],
            "quant_algo": facts["quant_algo"],
            **({"kv_cache_scheme": eight} if quantized.kv_cache else {}),
            **by,
            "quant_method": "modelopt",
        }
        return files


TARGET = ModelOpt(
    name="hf-modelopt",
    summary="ModelOpt's quantized Hugging Face layout",
    api=1,
    layouts=_LAYOUTS,
    kv_caches=_KV_CACHES,
    folds="shared",
)
