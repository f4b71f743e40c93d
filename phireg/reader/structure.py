"""Compare a checkpoint's config.json and tensors with the reader's requirements.

What TensorRT-LLM only warns about is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import CheckError
from phireg.reader.architectures import NESTED, mapping_problems, required_keys
from phireg.reader.schemes import KNOWN
from phireg.reader.tensors import Kind, required_tensors

_ROTARY_TABLES = re.compile(
    r"(long_rope_)?(embed_positions\w*|rotary_inv_freq)|(short|long)_inv_freq"
)
"""Constants that TensorRT-LLM 0.12 and later writes at the root and computes again on loading."""

_EXTRA_SCALES = re.compile(
    r"(transformer\.layers\.\d+\.attention\.(k_cache|v_cache|kv_cache_rcp)|"
    r"lm_head\.(weights|activation))_scaling_factor"
)
"""Exporters of some releases write them beside what the reader needs; it drops or derives them."""


class Deviation(NamedTuple):
    """A tensor that is not as the reader requires; it accepts it all the same if ``harmless``."""

    name: str
    text: str
    harmless: bool


def structure_findings(
    config: Mapping[str, Any], ranks: Sequence[Mapping[str, Kind]]
) -> list[tuple[str, str, bool]]:
    """List what is missing, unknown, mis-shaped or of another dtype, as (where, what, harmless).

    The reader accepts a harmless deviation. Tensors of algorithms and architectures unknown here
    are not judged, nor is an empty rank, whose defect is known.
    """
    problems = [("config.json", problem, False) for problem in _config_problems(config)]
    try:
        return [*problems, *_deviations(config, ranks)]
    except CheckError as error:
        return problems or [("config.json", error.message.removeprefix("config.json: "), False)]


def tensor_deviations(
    tensors: Mapping[str, Kind],
    required: Mapping[str, Kind],
    optional: Mapping[str, Kind] | None = None,
) -> Iterator[Deviation]:
    """Compare a rank file's tensors with those that it must and may have."""
    accepted = {**(optional or {}), **required}
    for name, (code, shape) in accepted.items():
        if name not in tensors:
            if name in required:
                yield Deviation(name, "is missing", False)
            continue
        stored_code, stored_shape = tensors[name]
        if stored_shape == () and shape == (1,):
            yield Deviation(name, "is a scalar, which the reader takes for [1]", True)
        elif stored_shape != shape:
            text = f"is {list(stored_shape)}, the reader expects {list(shape)}"
            yield Deviation(name, text, False)
            continue
        if (stored_code, code) == ("I8", "F8_E4M3"):
            text = "holds float8_e4m3fn as int8, as early exporters wrote it"
            yield Deviation(name, text, True)
        elif code and stored_code != code:
            yield Deviation(name, f"is {stored_code}, config.json says {code}", False)
    for name in sorted(tensors.keys() - accepted.keys()):
        if _EXTRA_SCALES.fullmatch(name) and _is_quantized(name, required):
            yield Deviation(name, "is not needed; the reader leaves it out", True)
        elif not _ROTARY_TABLES.fullmatch(name):
            yield Deviation(name, "is not known to the reader", False)


def _deviations(
    config: Mapping[str, Any], ranks: Sequence[Mapping[str, Kind]]
) -> Iterator[tuple[str, str, bool]]:
    quantization = config.get("quantization") or {}
    if not isinstance(quantization, Mapping) or quantization.get("quant_algo") not in KNOWN:
        return
    required = required_tensors(config, len(ranks))
    for rank, tensors in enumerate(ranks):
        if tensors and required is not None:
            for name, text, harmless in tensor_deviations(tensors, required):
                yield f"rank{rank}.safetensors: {name}", text, harmless


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key in required_keys(config):
        if config.get(key) is None and not (key == "gegelu_limit" and key in config):
            yield f"{key} is missing, and the reader has no default"
    if str(config.get("dtype")) not in WEIGHT_DTYPES and config.get("dtype") is not None:
        yield f"dtype is {config['dtype']!r}; known are {', '.join(WEIGHT_DTYPES)}"
    for name, known in NESTED.items():
        block = config.get(name)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            yield f"{name} is not an object"
        elif unknown := sorted(set(block) - known):
            yield f"{name} has {', '.join(unknown)}, which no release of the reader accepts"
    mapping = config.get("mapping")
    if isinstance(mapping, Mapping):
        yield from (f"mapping: {problem}" for problem in mapping_problems(mapping))


def _is_quantized(name: str, required: Mapping[str, Kind]) -> bool:
    """Return whether the scale belongs to something that is quantized in this checkpoint."""
    if name.startswith("lm_head."):
        return any(code == "F8_E4M3" for code, _ in required.values())
    return f"{name.rpartition('.')[0]}.kv_cache_scaling_factor" in required
