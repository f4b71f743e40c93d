"""Structure: what the reader requires, with what TensorRT-LLM only warns about as errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phireg.checkpoint.schema import required_tensors
from phireg.plan.model import DTYPES
from phireg.quant.schemes import WEIGHT_ONLY
from phireg.verify.reader import NESTED, required_keys, with_defaults

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype code and shape by name."""

_ROTARY_TABLES = re.compile(
    r"(long_rope_)?(embed_positions\w*|rotary_inv_freq)|(short|long)_inv_freq"
)
"""Constants that TensorRT-LLM 0.12 and later writes at the root and computes again on loading."""


def structure_problems(
    config: Mapping[str, Any], ranks: Sequence[Tensors]
) -> list[tuple[str, str]]:
    """What is missing, unknown, mis-shaped or of another dtype, as (where, what).

    Args:
        config: config.json. Quantized tensors and unknown architectures are not judged.
        ranks: each rank file's tensors; an empty one, whose defect is known, is passed over.
    """
    found = [("config.json", problem) for problem in _config(config)]
    quantization = config.get("quantization")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, Mapping) else None
    if algorithm not in (None, *WEIGHT_ONLY.values()):
        return found
    try:
        required = required_tensors(with_defaults(config), len(ranks))
    except (KeyError, TypeError) as problem:
        return found or [("config.json", f"{problem} is missing or of the wrong type")]
    if required is None:
        return found
    code = DTYPES.get(str(config.get("dtype")))
    for rank, tensors in enumerate(ranks):
        if tensors:
            file = f"rank{rank}.safetensors"
            found += [(f"{file}: {n}", text) for n, text in _tensors(tensors, required, code)]
    return found


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    for key in required_keys(config):
        if config.get(key) is None and not (key == "gegelu_limit" and key in config):
            yield f"{key} is missing, and the reader has no default"
    if str(config.get("dtype")) not in DTYPES and config.get("dtype") is not None:
        yield f"dtype is {config['dtype']!r}; known are {', '.join(DTYPES)}"
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


def _tensors(
    tensors: Tensors, required: Mapping[str, tuple[int, ...]], code: str | None
) -> Iterator[tuple[str, str]]:
    for name, shape in required.items():
        if name not in tensors:
            yield name, "is missing"
        elif tensors[name][1] != shape:
            yield name, f"is {list(tensors[name][1])}, the reader expects {list(shape)}"
        elif code and tensors[name][0] != code:
            yield name, f"is {tensors[name][0]}, config.json says {code}"
    for name in sorted(tensors.keys() - required.keys()):
        if not _ROTARY_TABLES.fullmatch(name):
            yield name, "is not known to the reader"
