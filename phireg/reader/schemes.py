"""The quantization schemes: how TensorRT-LLM's reader finds quantized linears and KV caches.

Quantized linears follow TensorRT-LLM's FP8Linear and SmoothQuantLinear, whose scales are
parameters: all of them must be in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from phireg.formats import FORMATS
from phireg.reader.architectures import NESTED
from phireg.reader.config import Config
from phireg.reader.storage import Packing, Storage

WeightScheme: TypeAlias = Literal[
    "fp8", "int8_sq", "int8_wo", "int4_wo", "int4_awq", "w4a8_awq", "nvfp4"
]
Grid: TypeAlias = Literal["fp8", "int8"]

ROW_LINEARS = ("attention.dense", "mlp.proj")
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
"""The linears of a layer. A row linear's inputs are split over the ranks, a column linear's
outputs."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """The storage of a quantized checkpoint's linears.

    Codes are safetensors' and None is the checkpoint's dtype, in which TensorRT-LLM's builder
    quantizes weights. Every quantized linear must have the scales in ``companions``.
    """

    qformat: WeightScheme  # the name users type
    quant_algo: str  # in config.json's ``quantization``
    weight: str | None  # code of quantized weights
    companions: Mapping[str, str | None]  # codes of scales
    storage: Storage | None = None  # of quantized weights

    @property
    def grouped(self) -> bool:
        """True if groups of a row's inputs have scales of their own."""
        return self.storage is not None and self.storage.form.per == "group"

    @property
    def per_channel(self) -> bool:
        """True if weights_scaling_factor has one entry per output row; [1] if not."""
        return self.weight is not None and FORMATS[self.qformat].per == "channel"


def _stored(qformat: WeightScheme, quant_algo: str, packing: Packing | None = None) -> Scheme:
    """Return the scheme of quantized weights, by the parts of any linear."""
    form = FORMATS[qformat]
    storage = Storage("trtllm", form, packing)
    parts = storage.parts(2, form.group_size or 1, "")
    weight = parts.pop("weight")
    companions = {part.name: part.code or None for part in parts.values()}
    return Scheme(qformat, quant_algo, weight.code, companions, storage)


SCHEMES: Mapping[str, Scheme] = {
    scheme.qformat: scheme
    for scheme in (
        _stored("fp8", "FP8"),
        _stored("int8_sq", "W8A8_SQ_PER_CHANNEL"),
        Scheme("int8_wo", "W8A16", None, {}),
        Scheme("int4_wo", "W4A16", None, {}),
        _stored("int4_awq", "W4A16_AWQ", "rows"),
        _stored("w4a8_awq", "W4A8_AWQ", "rows"),
        _stored("nvfp4", "NVFP4", "columns"),
    )
}
"""By ``--qformat``.

The weight-only schemes have a portable form on disk, raw floating-point weights and the name of the
algorithm: ``trtllm-build`` quantizes them for the GPU it builds for. Their pre-processed form
depends on the converting machine's GPU and carries no mark of it, so phireg never writes it.
"""

WEIGHT_ONLY: Mapping[str, str] = {
    name.removesuffix("_wo"): scheme.quant_algo
    for name, scheme in SCHEMES.items()
    if scheme.weight is None
}
"""``--weight-only-precision`` to TensorRT-LLM's ``quant_algo``."""

KV_CACHES: Mapping[str, str] = {"fp8": "FP8", "int8": "INT8"}
"""``--kv-cache-dtype`` to TensorRT-LLM's ``kv_cache_quant_algo``."""

KV_SCALE = "kv_cache_scaling_factor"
"""The scale of an attention module's KV cache, float32 [1]: what is stored is key (or value)
divided by it."""

QFORMATS = {scheme.quant_algo: scheme.qformat for scheme in SCHEMES.values()}
CACHE_DTYPES = {algorithm: name for name, algorithm in KV_CACHES.items()}
"""``--qformat`` and ``--kv-cache-dtype`` by what a checkpoint's ``quantization`` has."""
RAW = (None, *WEIGHT_ONLY.values())
"""Values of ``quant_algo`` whose weights are in the checkpoint's dtype."""
KNOWN = (None, *QFORMATS)
"""Values of ``quant_algo`` whose tensors are known."""

_MOST_PATTERNS = 100

_DEFAULT_GROUP = 128
# Settings that change nothing under the algorithms without groups, with the values that say so.
_INERT: Mapping[str, tuple[Any, ...]] = {
    "group_size": (None, 0, _DEFAULT_GROUP),
    "has_zero_point": (None, False),
    "pre_quant_scale": (None, False),
    "clamp_val": (None,),
    "use_meta_recipe": (None, False),
}


class Excluded:
    """The modules that ``exclude_modules`` names, which the reader leaves alone.

    It matches patterns with full names; before 0.11, names with the last component. A ValueError
    says that there are more patterns than a model has kinds of modules.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._names = frozenset(patterns)
        self._wild = [name for name in self._names if set(name) & set("*?[")]
        if len(self._wild) > _MOST_PATTERNS:
            raise ValueError(f"{len(self._wild)} patterns, more than {_MOST_PATTERNS}")

    def __contains__(self, name: str) -> bool:
        """Return whether a module is left alone."""
        if name in self._names or name.rpartition(".")[2] in self._names:
            return True
        return any(fnmatchcase(name, pattern) for pattern in self._wild)

    def __bool__(self) -> bool:
        return bool(self._names)


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantized parts of a checkpoint; ``weights`` is a key of SCHEMES."""

    weights: str | None = None  # a WeightScheme; of other layouts, what people call it
    kv_cache: Grid | None = None
    excluded: Excluded = field(default=Excluded(()), compare=False)
    bits: int = 8  # of the coarsest weights

    def scheme(self, module: str) -> Scheme | None:
        """Return how a linear of a layer is stored, or None for the checkpoint's dtype."""
        if self.weights is None or module in self.excluded:
            return None
        return SCHEMES[self.weights]


def parse_quantization(config: Config) -> Quantization:
    """Read the ``quantization`` block of config.json."""
    block = config.block("quantization")
    patterns = block.values.get("exclude_modules") or []
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise block.error(f"exclude_modules is {patterns!r}, not a list of module names")
    try:
        excluded = Excluded(patterns)
    except ValueError as error:
        raise block.error(f"exclude_modules has {error}") from None
    weights = _algorithm(block, "quant_algo", QFORMATS)
    grouped = weights is not None and SCHEMES[weights].grouped
    cache = _algorithm(block, "kv_cache_quant_algo", CACHE_DTYPES)
    return Quantization(weights, cache, excluded, 4 if grouped else 8)


def check_quantization(config: Config, num_layers: int) -> None:
    """Refuse settings without exact arithmetic here, and linears that are not quantized alike."""
    block, quantization = config.block("quantization"), parse_quantization(config)
    if quantization.weights is None:
        return
    inert = dict(_INERT)
    form = FORMATS[quantization.weights]
    if (size := form.group_size) is not None:
        inert["group_size"] = (size, None) if size == _DEFAULT_GROUP else (size,)
        if form.smoothing is not None:
            inert["pre_quant_scale"] = (True,)
    for key, value in block.values.items():
        if key not in NESTED["quantization"]:
            raise block.error(f"{key} is unknown to the executor")
        if key in inert and value not in inert[key]:
            raise block.error(f"{key} is {value!r}: {block.get('quant_algo')} has no such feature")
    for layer in range(num_layers):
        for linear in LINEARS:
            name = f"transformer.layers.{layer}.{linear}"
            if name in quantization.excluded:
                raise block.error(
                    f"exclude_modules leaves {name} unquantized",
                    "the executor runs checkpoints that quantize every linear of every layer",
                )
    # An empty list is the reader's own, which has these; any other replaces that.
    router = ["transformer.layers.0.mlp.router"] if config.values.get("moe") else []
    for name in ("lm_head", *router) if quantization.excluded else ():
        if name not in quantization.excluded:
            leaf = name.rpartition(".")[2]
            raise block.error(
                f"exclude_modules has no {leaf}, so TensorRT-LLM would quantize it",
                f"the executor runs checkpoints whose {leaf} is not quantized",
            )


def _algorithm(block: Config, key: str, known: Mapping[str, Any]) -> Any:
    value = block.values.get(key)
    if value is not None and (not isinstance(value, str) or value not in known):
        raise block.error(f"{key} {value!r} is not known", f"known are {', '.join(known)}")
    return None if value is None else known[value]
