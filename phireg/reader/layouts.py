"""The two layouts of quantized Hugging Face directories: ModelOpt's and compressed-tensors'.

Their settings say of each module how its linear is stored. One without an exact meaning here is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from phireg.formats import FORMATS, Format, Grid, Inputs
from phireg.reader.config import Config
from phireg.reader.storage import ANY_FLOAT, LayoutName, Packing, Part, Storage

SIDECAR = "hf_quant_config.json"
"""ModelOpt's own file; config.json repeats it."""

_MOST_PATTERNS = 4096


@dataclass(frozen=True, slots=True)
class Layout:
    """The quantization of a directory."""

    name: LayoutName  # "hf" if nothing is quantized
    algorithm: str  # what people call it; empty if no weights are quantized
    storage: Callable[[str], Storage | None]  # of a module, by its name; None: in the model's dtype
    excluded: tuple[str, ...] = ()  # patterns of modules left alone, as the files have them
    cache: Literal["fp8"] | None = None

    def cache_parts(self, code: str) -> dict[str, Part]:
        """Return the scales of an attention module's KV cache, ``k`` and ``v``."""
        if self.cache is None:
            return {}
        if self.name == "hf-modelopt":
            return {what: Part(f"{what}_proj.{what}_scale", "F32", ()) for what in "kv"}
        return {what: Part(f"{what}_scale", ANY_FLOAT, (1,)) for what in "kv"}


def is_quantized(config: Mapping[str, Any], sidecar: Mapping[str, Any] | None) -> bool:
    """Return whether a directory is of one of the two layouts."""
    block = config.get("quantization_config")
    method = block.get("quant_method") if isinstance(block, Mapping) else None
    return sidecar is not None or method in ("modelopt", "compressed-tensors")


def parse_layout(
    values: Mapping[str, Any], sidecar: Mapping[str, Any] | None, where: str = "config.json"
) -> Layout:
    """Read the quantization of a directory from config.json and ``hf_quant_config.json``."""
    config = Config(values, where)
    block = config.block("quantization_config")
    method = block.values.get("quant_method")
    if sidecar is not None or method == "modelopt":
        return _modelopt(block, sidecar)
    if not block.values:
        return Layout("hf", "", lambda module: None)
    if method == "compressed-tensors":
        return _compressed(block)
    raise block.error(
        f"quant_method is {method!r}, whose tensors are unknown",
        "known are modelopt and compressed-tensors",
    )


# ModelOpt

_ALGORITHMS: Mapping[str, Storage] = {
    "FP8": Storage("hf-modelopt", FORMATS["fp8"]),
    "FP8_PER_CHANNEL_PER_TOKEN": Storage("hf-modelopt", FORMATS["fp8_pc_pt"]),
    "W8A8_SQ_PER_CHANNEL": Storage("hf-modelopt", FORMATS["int8_sq"]),
    "W8A16": Storage("hf-modelopt", FORMATS["int8_wo"]),
    "W4A16_AWQ": Storage("hf-modelopt", FORMATS["int4_awq"], "rows"),
    "W4A8_AWQ": Storage("hf-modelopt", FORMATS["w4a8_awq"], "rows"),
    "NVFP4": Storage("hf-modelopt", FORMATS["nvfp4"], "columns"),
    "W4A16_NVFP4": Storage("hf-modelopt", replace(FORMATS["nvfp4"], inputs=None), "columns"),
}


def _modelopt(block: Config, sidecar: Mapping[str, Any] | None) -> Layout:
    """Read either file, or both, which must agree."""
    given = []
    if sidecar is not None:
        given.append(
            _modelopt_block(Config(sidecar, SIDECAR).block("quantization"), "exclude_modules")
        )
    if block.has("quant_algo") or (block.values and sidecar is None):
        given.append(_modelopt_block(block, "ignore"))
    first = given[0]
    for other in given[1:]:
        for what, ours, theirs in (
            ("quant_algo", first.algorithm, other.algorithm),
            ("the KV cache", first.cache, other.cache),
            ("the excluded modules", set(first.excluded), set(other.excluded)),
        ):
            if ours != theirs:
                raise block.error(
                    f"{what} differs from {SIDECAR}: {_shown(theirs)} and {_shown(ours)}",
                    "readers take one file or the other: export the model again",
                )
    return first


def _shown(value: Any) -> str:
    return ", ".join(sorted(value)) or "none" if isinstance(value, set) else str(value or "none")


def _modelopt_block(block: Config, exclusions: str) -> Layout:
    algorithm = block.values.get("quant_algo")
    excluded = _patterns(block, exclusions)
    cache = _modelopt_cache(block)
    if algorithm is None:
        return Layout("hf-modelopt", "", lambda module: None, excluded, cache)
    if algorithm == "MIXED_PRECISION":
        modules = {
            name: _algorithm(Config(settings, f"{block.where}: {name}"))
            for name, settings in block.block("quantized_layers").values.items()
            if isinstance(settings, Mapping)
        }
        return Layout("hf-modelopt", algorithm, modules.get, excluded, cache)
    storage = _algorithm(block)

    def of(module: str) -> Storage | None:
        return None if any(_names(pattern, module) for pattern in excluded) else storage

    return Layout("hf-modelopt", str(algorithm), of, excluded, cache)


def _algorithm(block: Config) -> Storage:
    name = block.values.get("quant_algo")
    storage = _ALGORITHMS.get(name) if isinstance(name, str) else None
    if storage is None:
        raise block.error(f"quant_algo {name!r} is unknown", f"known are {', '.join(_ALGORITHMS)}")
    size = storage.form.group_size
    if block.has("group_size") and block.values["group_size"] not in (0, size):
        raise block.error(f"group_size is {block.values['group_size']!r}; {name} has {size}")
    if block.values.get("has_zero_point"):
        raise block.error("has_zero_point is true: levels without zero points are known alone")
    return storage


def _modelopt_cache(block: Config) -> Literal["fp8"] | None:
    named, scheme = (block.values.get(key) for key in ("kv_cache_quant_algo", "kv_cache_scheme"))
    if isinstance(scheme, Mapping):
        return _cache(block)
    value = named if named is not None else scheme
    if value not in (None, "FP8"):
        raise block.error(f"the KV cache is quantized as {value!r}", "known is FP8")
    return "fp8" if value == "FP8" else None


def _names(pattern: str, module: str) -> bool:
    """Return whether a pattern, or a name, is a module's or that of one around it."""
    if set(pattern) & set("*?["):
        return fnmatchcase(module, pattern)
    return module == pattern or module.startswith(f"{pattern}.")


# compressed-tensors

_GRIDS: Mapping[tuple[int, str], Grid] = {
    (8, "float"): "e4m3", (8, "int"): "int8", (4, "int"): "int4", (4, "float"): "e2m1",
}  # fmt: skip
_PACKINGS: Mapping[str, Packing | None] = {
    "float-quantized": None,
    "int-quantized": None,
    "naive-quantized": None,
    "pack-quantized": "words",
    "nvfp4-pack-quantized": "columns",
}
_QUANTIFIERS = 4


def _compressed(block: Config) -> Layout:
    for key in ("sparsity_config", "transform_config"):
        value = block.values.get(key)
        is_dense = isinstance(value, Mapping) and value.get("format") in (None, "dense")
        if value is not None and not is_dense:
            raise block.error(f"{key} is set, which has no meaning here")
    if block.values.get("quantization_status", "compressed") != "compressed":
        raise block.error(f"quantization_status is {block.values['quantization_status']!r}")
    ignored = _patterns(block, "ignore")
    groups: list[tuple[list[Callable[[str], bool]], Storage | None]] = []
    names = []
    for name, values in block.block("config_groups").values.items():
        group = Config(values if isinstance(values, Mapping) else {}, f"{block.where}: {name}")
        storage = _group(group, block.values.get("format"))
        if storage is not None:
            names.append(storage.form.name)
        groups.append(([_matcher(group, t) for t in _patterns(group, "targets")], storage))
    left_alone = [_matcher(block, pattern) for pattern in ignored]

    def of(module: str) -> Storage | None:
        if any(matches(module) for matches in left_alone):
            return None
        found = [s for targets, s in groups if any(matches(module) for matches in targets)]
        if len(set(found)) > 1:
            raise block.error(f"{module} belongs to groups of different formats")
        return found[0] if found else None

    cache = _cache(block) if block.has("kv_cache_scheme") else None
    algorithm = " and ".join(dict.fromkeys(names))
    return Layout("hf-compressed-tensors", algorithm, of, ignored, cache)


def _group(group: Config, whole: Any) -> Storage | None:
    """Read one of ``config_groups``; None if it quantizes no weights."""
    if not group.has("weights"):
        if group.has("input_activations") or group.has("output_activations"):
            raise group.error("only inputs or outputs are quantized, which has no meaning here")
        return None
    if group.has("output_activations"):
        raise group.error("output_activations is set, which has no meaning here")
    weights, name = group.block("weights"), str(group.values.get("format") or whole)
    if name not in _PACKINGS:
        raise group.error(f"the format is {name!r}", f"known are {', '.join(_PACKINGS)}")
    packing, grid = _PACKINGS[name], _grid(weights)
    default = "group" if weights.has("group_size") else "tensor"
    strategy = str(weights.values.get("strategy") or default)
    if grid == "e2m1" and strategy == "tensor_group":
        strategy = "group"
    strategies: Mapping[Any, Literal["tensor", "channel", "group"]]
    strategies = {"tensor": "tensor", "channel": "channel", "group": "group"}
    per = strategies.get(strategy)
    if per is None or (grid == "e2m1" and per != "group"):
        raise weights.error(f"strategy {strategy!r} of {grid} has no meaning here")
    if weights.values.get("dynamic") not in (None, False):
        raise weights.error("weights are quantized dynamically, which has no meaning here")
    if weights.values.get("actorder") not in (None, False, "static", "weight"):
        raise weights.error(
            f"actorder is {weights.values['actorder']!r}: groups of columns in another order",
            "quantize it with actorder static",
        )
    stored_so = {"words": ("int4", "int8"), "columns": ("e2m1",), None: ("e4m3", "int8")}[packing]
    if grid not in stored_so:
        raise group.error(f"{name} does not store {grid}")
    size = weights.integer("group_size") if per == "group" else None
    inputs = _inputs(group.block("input_activations")) if group.has("input_activations") else None
    if inputs is not None and (inputs.scale == "group") != (grid == "e2m1"):
        raise group.error(f"inputs by {inputs.scale} of {grid} weights have no meaning here")
    levels: Literal[1, 2] = 2 if grid == "e2m1" else 1
    form = _named(Format("", grid, per, inputs, "", group_size=size, levels=levels))
    return Storage("hf-compressed-tensors", form, packing, reciprocal=True)


def _named(form: Format) -> Format:
    """Return a format under the name of the one that computes the same but for smoothing."""
    for name in ("fp8", "fp8_dynamic", "w8a8", "w4a16", "nvfp4", "int8_wo", "int4_wo"):
        known = replace(FORMATS[name], smoothing=None)
        if replace(form, name=name, summary=known.summary) == known:
            return known
    bits = "float" if form.inputs is None else form.inputs.grid
    return replace(form, name=f"{form.weight} by {form.group_size or form.per}, inputs {bits}")


def _grid(block: Config) -> Grid:
    bits, kind = block.values.get("num_bits", 8), block.values.get("type", "int")
    grid = _GRIDS.get((bits, kind)) if isinstance(bits, int) and isinstance(kind, str) else None
    if grid is None:
        raise block.error(f"num_bits {bits!r} of type {kind!r} are unknown")
    if block.values.get("symmetric", True) is not True:
        raise block.error("symmetric is false: levels without zero points are known alone")
    return grid


def _inputs(block: Config) -> Inputs:
    grid, dynamic = _grid(block), block.values.get("dynamic", False)
    strategy = str(block.values.get("strategy") or ("token" if dynamic else "tensor"))
    known: Mapping[tuple[Any, Any], Literal["tensor", "token", "group"]] = {
        ("tensor", False): "tensor", ("token", True): "token", ("tensor_group", "local"): "group",
    }  # fmt: skip
    scale = known.get((strategy, dynamic)) if isinstance(dynamic, str | bool) else None
    if scale is None or (scale == "group") != (grid == "e2m1"):
        raise block.error(f"strategy {strategy!r} with dynamic {dynamic!r} has no meaning here")
    if scale == "group" and block.values.get("group_size", 16) != 16:
        raise block.error(f"group_size is {block.values['group_size']!r}, not 16")
    return Inputs(grid, scale)


def _cache(block: Config) -> Literal["fp8"]:
    scheme = block.block("kv_cache_scheme")
    if _grid(scheme) != "e4m3" or scheme.values.get("dynamic") not in (None, False):
        raise scheme.error("a KV cache with other than static FP8 scales is unknown")
    if scheme.values.get("strategy") not in (None, "tensor"):
        raise scheme.error(f"strategy {scheme.values['strategy']!r} is unknown")
    return "fp8"


def _patterns(block: Config, key: str) -> tuple[str, ...]:
    values = block.values.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise block.error(f"{key} is not a list of names")
    if len(values) > _MOST_PATTERNS:
        raise block.error(f"{key} has {len(values)} patterns, more than {_MOST_PATTERNS}")
    return tuple(values)


def _matcher(block: Config, pattern: str) -> Callable[[str], bool]:
    """Return what a target or an entry of ``ignore`` matches.

    A class ("Linear"), a module's whole name, or "re:" and an expression that the name begins
    with. An expression may take long to match, so those with many repetitions are refused.
    """
    if not pattern.startswith("re:"):
        return lambda module: pattern in ("Linear", module)
    expression = pattern[3:]
    problem = None
    repetitions = len(re.findall(r"(?<!\\)[*+?{]", expression))
    nested = re.search(r"\)[*+?{]|[*+?}]{2}", expression) or repetitions > _QUANTIFIERS
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        problem = str(error)
    if problem is None and (nested or len(expression) > 300):
        problem = "it may take too long to match"
    if problem is not None:
        raise block.error(f"the expression {expression[:100]!r} cannot be used: {problem}")
    return lambda module: compiled.match(module) is not None
