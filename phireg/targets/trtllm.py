"""TensorRT-LLM checkpoints, the default: a file per rank, and TensorRT-LLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phireg.reader.schemes import KV_CACHES, KV_SCALE, SCHEMES
from phireg.targets.target import Layout, Quantized, Stored, Target, WrittenModel

_LAYOUTS = {
    name: Layout(
        scheme.quant_algo,
        scheme.weight,
        {
            # ModelOpt writes numbers of nvfp4 without an axis.
            scale: Stored(scale, code, "scalar" if name == "nvfp4" and code == "F32" else "vector")
            for scale, code in scheme.companions.items()
        },
        None if scheme.storage is None else scheme.storage.packing,
    )
    for name, scheme in SCHEMES.items()
}


def quantization_block(quantized: Quantized) -> dict[str, Any]:
    """Return what TensorRT-LLM's and ModelOpt's files say of a quantization."""
    form = quantized.format
    return {
        "quant_algo": quantized.layout.algorithm,
        "kv_cache_quant_algo": KV_CACHES[quantized.kv_cache] if quantized.kv_cache else None,
        "exclude_modules": list(quantized.excluded),
        **({} if form.group_size is None else {"group_size": form.group_size}),
        **({"has_zero_point": False, "pre_quant_scale": True} if form.smoothing == "awq" else {}),
    }


@dataclass(frozen=True, kw_only=True)
class TensorRTLLM(Target):
    """The family's rules as they are."""

    def config_files(self, model: WrittenModel) -> dict[str, dict[str, Any]]:
        """Return config.json with what every release knows of mapping and quantization."""
        fields, ranks, quantized = model.fields, model.ranks, model.quantized
        mapping = {"world_size": ranks.tp_size, "tp_size": ranks.tp_size, "pp_size": 1}
        if ranks.moe_ep_size > 1:
            # Every reader that knows experts knows these; without them it divides each expert.
            mapping |= {"moe_tp_size": ranks.moe_tp_size, "moe_ep_size": ranks.moe_ep_size}
        plain = {"quant_algo": None, "kv_cache_quant_algo": None}
        return {
            "config.json": {
                "architecture": fields.get("architecture"),
                "dtype": model.dtype,
                **{key: value for key, value in fields.items() if key != "architecture"},
                "mapping": mapping,
                "quantization": plain if quantized is None else quantization_block(quantized),
            }
        }


TARGET = TensorRTLLM(
    name="trtllm",
    summary="a TensorRT-LLM checkpoint, a file per rank",
    api=1,
    layouts=_LAYOUTS,
    kv_caches={name: {KV_SCALE: Stored(KV_SCALE)} for name in KV_CACHES},
    by_rank=True,
)
