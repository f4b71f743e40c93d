"""Structure: what the reader requires, with what TensorRT-LLM only warns about as errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phireg.dtypes import WEIGHT_DTYPES
from phireg.reader.keys import NESTED, required_keys, with_defaults
from phireg.reader.schema import KNOWN, required_tensors

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype code and shape by name."""

_ROTARY_TABLES = re.compile(
    r"(long_rope_)?(embed_positions\w*|rotary_inv_freq)|(short|long)_inv_freq"
)
"""Constants that TensorRT-LLM 0.12 and later writes at the root and computes again on loading."""


_EXTRA_SCALES = re.compile(
    r"(transformer\.layers\.\d+\.attention\.(k_cache|v_cache|kv_cache_rcp)|"
    r"lm_head\.(weights|activation))_scaling_factor"
)
"""What exporters of some releases write beside what the reader needs; it drops or derives them."""


def structure_problems(
    config: Mapping[str, Any], ranks: Sequence[Tensors]
) -> list[tuple[str, str]]:
    """What is missing, unknown, mis-shaped or of another dtype, as (where, what).

    Args:
        config: config.json. Tensors of algorithms and architectures unknown here are not judged.
        ranks: each rank file's tensors; an empty one, whose defect is known, is passed over.
    """
    return [(where, what) for where, what, harmless in _findings(config, ranks) if not harmless]


def structure_notes(config: Mapping[str, Any], ranks: Sequence[Tensors]) -> list[tuple[str, str]]:
    """What the reader accepts although phireg writes it otherwise, as (where, what).

    Arguments are those of :func:`structure_problems`.
    """
    return [(where, what) for where, what, harmless in _findings(config, ranks) if harmless]


def _findings(
    config: Mapping[str, Any], ranks: Sequence[Tensors]
) -> Iterator[tuple[str, str, bool]]:
    found = list(_config(config))
    yield from (("config.json", problem, False) for problem in found)
    quantization = config.get("quantization")
    if not isinstance(quantization, Mapping | None):
        return
    if (quantization or {}).get("quant_algo") not in KNOWN:
        return
    try:
        required = required_tensors(with_defaults(config), len(ranks))
    except (KeyError, TypeError, ZeroDivisionError) as problem:
        if not found:
            yield "config.json", f"{problem} is missing or of the wrong type", False
        return
    if required is None:
        return
    for rank, tensors in enumerate(ranks):
        if tensors:
            file = f"rank{rank}.safetensors"
            for name, text, harmless in _tensors(tensors, required):
                yield f"{file}: {name}", text, harmless


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    for key in required_keys(config):
        if config.get(key) is None and not (key == "gegelu_limit" and key in config):
            yield f"{key} is missing, and the reader has no default"
    if str(config.get("dtype")) not in WEIGHT_DTYPES and config.get("dtype") is not None:
        yield f"dtype is {config['dtype']!r}; known are {', '.join(WEIGHT_DTYPES)}"
    for block, known in NESTED.items():
        found = config.get(block)
        if found is None:
            continue
        if not isinstance(found, Mapping):
            yield f"{block} is not an object"
        elif unknown := sorted(set(found) - known):
            yield f"{block} has {', '.join(unknown)}, which no release of the reader accepts"
    mapping = config.get("mapping")
    if isinstance(mapping, Mapping):
        world, tp, pp = (mapping.get(k, 1) for k in ("world_size", "tp_size", "pp_size"))
        if pp != 1:
            yield f"mapping.pp_size is {pp}; no Phi model of the reader has pipeline stages"
        elif tp != world:
            yield f"mapping.tp_size is {tp} and world_size {world}"
        moe_tp, moe_ep = (mapping.get(key) for key in ("moe_tp_size", "moe_ep_size"))
        if moe_ep is not None and not (moe_tp and moe_ep and moe_tp * moe_ep == tp):
            yield f"mapping.moe_tp_size {moe_tp} times moe_ep_size {moe_ep} is not tp_size {tp}"


def _tensors(tensors: Tensors, required: Tensors) -> Iterator[tuple[str, str, bool]]:
    for name, (code, shape) in required.items():
        if name not in tensors:
            yield name, "is missing", False
            continue
        found, size = tensors[name]
        if size == () and shape == (1,):
            yield name, "is a scalar, which the reader takes for [1]", True
        elif size != shape:
            yield name, f"is {list(size)}, the reader expects {list(shape)}", False
            continue
        if (found, code) == ("I8", "F8_E4M3"):
            yield name, "holds float8_e4m3fn as int8, as early exporters wrote it", True
        elif code and found != code:
            yield name, f"is {found}, config.json says {code}", False
    for name in sorted(tensors.keys() - required.keys()):
        if _EXTRA_SCALES.fullmatch(name) and _has_scales(name, required):
            yield name, "is not needed; the reader leaves it out", True
        elif not _ROTARY_TABLES.fullmatch(name):
            yield name, "is not known to the reader", False


def _has_scales(name: str, required: Tensors) -> bool:
    """Whether the scale belongs to something that is quantized in this checkpoint."""
    if name.startswith("lm_head."):
        return any(code == "F8_E4M3" for code, _ in required.values())
    return f"{name.rpartition('.')[0]}.kv_cache_scaling_factor" in required
