"""PEFT's LoRA adapters: what an adapter's two files add to the weights of a model.

A layer of LoRA adds ``scale * up @ down`` to a weight [rows, columns]: ``down`` (PEFT's lora_A) is
[rank, columns], ``up`` (lora_B) is [rows, rank]. For an embedding both are stored transposed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phireg.children import ChildError, call
from phireg.dtypes import WEIGHT_DTYPES
from phireg.files.json import read_json_object
from phireg.source.model import FORMATS
from phireg.source.tensors import SourceTensor, WeightsFile

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "bias", "use_rslora", "modules_to_save", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config"),
    *("megatron_core", "eva_config", "qalora_group_size", "runtime_config"),
    "fan_in_fan_out",  # of GPT-2's Conv1D; PEFT ignores it for the linears that Phi has
}
"""Keys that are read here or do not change the sum; any other one must be unset."""

_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are (pissa and olora do not)."""

_PART = re.compile(r"(.+)\.lora_(?:([AB])(?:\.[^.]+)?\.weight|embedding_([AB])(?:\.[^.]+)?)")
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.[^.]+)?)(?=\.(?:weight|bias)$)")
_PREFIX = "base_model.model."

_HIGHEST_RANK = 4096
_PATTERNS = ("rank_pattern", "alpha_pattern")
_PATTERN_LIMITS: Any = {"seconds": 5.0, "memory": 2**30, "longest": 2**24}


@dataclass(frozen=True, slots=True)
class Layer:
    """What LoRA adds to one module's weight."""

    module: str  # by the model's own names
    down: SourceTensor
    up: SourceTensor
    scale: float
    embedding: bool  # both factors are stored transposed, and the product too

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that it is added to."""
        up, down = self.up.shape, self.down.shape
        return (down[1], up[0]) if self.embedding else (up[0], down[1])


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter whose headers were read; with problems it cannot be merged."""

    file: WeightsFile
    rank: int
    layers: tuple[Layer, ...]
    saved: Mapping[str, SourceTensor]  # whole tensors that replace the model's, by its names
    problems: tuple[str, ...]


def read_adapter(directory: Path, name: str) -> Adapter:
    """Read config and headers of the adapter in a directory; ``name`` is its weights file."""
    config = read_json_object(directory / CONFIG)
    file = FORMATS[Path(name).suffix](directory, name)
    problems = list(_unsupported(config))
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_count(rank) or not _is_number(alpha):
        return Adapter(file, 0, (), {}, (*problems, f"r is {rank!r} and lora_alpha {alpha!r}"))
    parts: dict[str, dict[str, SourceTensor]] = {}
    saved: dict[str, SourceTensor] = {}
    whole: set[str] = set()
    for tensor in file.tensors:
        key = tensor.name.removeprefix(_PREFIX)
        if tensor.dtype not in WEIGHT_DTYPES.values():
            problems.append(f"{tensor.name} is {tensor.dtype}")
        elif match := _PART.fullmatch(key):
            part = match[2] or f"embedding_{match[3]}"
            parts.setdefault(match[1], {})[part] = tensor
        elif "lora_" in key or not key.endswith((".weight", ".bias")):
            problems.append(f"{tensor.name} is no part of a LoRA layer that can be merged")
        else:
            saved[_WRAPPED.sub("", key)] = tensor
            if ".base_layer." not in key:
                whole.add(key.rpartition(".")[0])
    values = dict.fromkeys(parts, (rank, alpha))
    tables = [config.get(key) or {} for key in _PATTERNS]
    if any(tables) and all(isinstance(table, dict) for table in tables):
        try:
            values = _by_pattern(tables, list(parts), (rank, alpha))
        except ChildError as error:
            problems.append(f"{' or '.join(_PATTERNS)} cannot be matched: {error}")
            parts = {}
    layers = []
    for module, factors in parts.items():
        embedding = "embedding_A" in factors
        down, up = (factors.get(f"{'embedding_' if embedding else ''}{part}") for part in "AB")
        ranked, scaled = values[module]
        if module in whole:
            problems.append(f"{module} has LoRA layers and is saved as a whole")
        elif down is None or up is None or len(factors) != 2:
            problems.append(f"{module} has {' and '.join(sorted(factors))} of lora_A and lora_B")
        elif len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
            problems.append(f"{module}: {list(up.shape)} x {list(down.shape)} are no two factors")
        elif not _is_count(ranked) or not _is_number(scaled):
            problems.append(f"{module}: rank {ranked!r} and alpha {scaled!r} by their patterns")
        elif down.shape[0] != ranked:
            problems.append(f"{module} has rank {down.shape[0]}, {CONFIG} says {ranked}")
        else:
            root = math.sqrt(ranked) if config.get("use_rslora") else ranked
            layers.append(Layer(module, down, up, scaled / root, embedding))
    if not layers and not saved and not problems:
        problems.append(f"{name} holds no layers")
    return Adapter(file, rank, tuple(layers), saved, tuple(problems))


def _unsupported(config: Mapping[str, Any]) -> Iterable[str]:
    """What a config asks for that a sum of products is not."""
    kind = config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        yield f"its method is {str(kind)[:60]}, not LORA"
    for key, value in config.items():
        if key not in _HARMLESS and value not in (None, False, "", [], {}):
            what = "DoRA (use_dora)" if key == "use_dora" else f"{key[:60]} = {str(value)[:60]}"
            yield f"it uses {what}, which is not merged"
    initialized = config.get("init_lora_weights")
    if not any(initialized is known or initialized == known for known in _INITIALIZATIONS):
        yield (
            f"init_lora_weights = {str(initialized)[:60]} changes the base weights as well; save "
            "it with path_initial_model_for_weight_conversion"
        )
    for key in _PATTERNS:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            yield f"{key} is {type(patterns).__name__}, not an object"


def _by_pattern(
    tables: Sequence[Mapping[str, Any]], modules: Sequence[str], defaults: tuple[Any, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return values of the first pattern that each name ends with; some would match for years."""

    def match() -> str:
        compiled = [
            [(re.compile(rf"(?:.*\.)?(?:{pattern})"), value) for pattern, value in table.items()]
            for table in tables
        ]
        return json.dumps(
            [
                [
                    next((value for pattern, value in table if pattern.fullmatch(module)), default)
                    for table, default in zip(compiled, defaults, strict=True)
                ]
                for module in modules
            ]
        )

    pairs = json.loads(call(match, **_PATTERN_LIMITS))
    return {module: (rank, alpha) for module, (rank, alpha) in zip(modules, pairs, strict=True)}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= _HIGHEST_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**40
