"""The quantization schemes phireg writes, as data: what TensorRT-LLM's reader finds on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the linears of a quantized checkpoint are stored.

    Attributes:
        qformat: the name users type.
        quant_algo: TensorRT-LLM's name, ``quantization.quant_algo`` in config.json.
        weight: safetensors code of quantized weights; None if they stay in the checkpoint's dtype
            and TensorRT-LLM's builder quantizes them.
        companions: scales that every quantized linear must have, with their safetensors codes;
            None for the checkpoint's dtype.
        per_channel: whether ``weights_scaling_factor`` has one entry per output row ([1] if not).
        calibrated: whether scales need the maxima of the linears' inputs.
    """

    qformat: str
    quant_algo: str
    weight: str | None
    companions: Mapping[str, str | None]
    per_channel: bool
    calibrated: bool


def _by_name(*schemes: Scheme) -> Mapping[str, Scheme]:
    return MappingProxyType({scheme.qformat: scheme for scheme in schemes})


_SCALES = {"weights_scaling_factor": "F32", "activation_scaling_factor": "F32"}

SCHEMES = _by_name(
    Scheme("fp8", "FP8", "F8_E4M3", MappingProxyType(_SCALES), per_channel=False, calibrated=True),
    Scheme(
        "int8_sq",
        "W8A8_SQ_PER_CHANNEL",
        "I8",
        MappingProxyType({"prequant_scaling_factor": None, **_SCALES}),
        per_channel=True,
        calibrated=True,
    ),
    Scheme("int8_wo", "W8A16", None, MappingProxyType({}), per_channel=False, calibrated=False),
    Scheme("int4_wo", "W4A16", None, MappingProxyType({}), per_channel=False, calibrated=False),
)
"""By ``--qformat``.

The weight-only schemes have a portable form on disk, raw floating-point weights and the name of the
algorithm: ``trtllm-build`` quantizes them for the GPU it builds for. Their pre-processed form
depends on the converting machine's GPU and carries no mark of it, so phireg never writes it.
"""

WEIGHT_ONLY = MappingProxyType(
    {
        name.removesuffix("_wo"): scheme.quant_algo
        for name, scheme in SCHEMES.items()
        if scheme.weight is None
    }
)
"""``--weight-only-precision`` to TensorRT-LLM's ``quant_algo``."""

KV_CACHES = MappingProxyType({"fp8": "FP8", "int8": "INT8"})
"""``--kv-cache-dtype`` to TensorRT-LLM's ``kv_cache_quant_algo``."""

KV_SCALE = "kv_cache_scaling_factor"
"""The scale of an attention module's KV cache, float32 [1]: what is stored is key (or value)
divided by it."""
