"""Source checkpoints made to order: tiny ones, random ones of any size, and real ones cut short."""

from __future__ import annotations

import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phireg.config.hf import HFConfig
from phireg.conversion.stream import read_blocks
from phireg.errors import PluginError, SourceError, UsageError
from phireg.family import Family
from phireg.files.json import read_json_object
from phireg.files.kinds import tokenizer_files
from phireg.files.output import OutputDirectory
from phireg.files.safetensors import TensorEntry, encode_header
from phireg.files.writing import copy_file
from phireg.layout.rules import published_shapes
from phireg.source.hub import resolve_model_dir
from phireg.source.readings import open_source
from phireg.source.tensors import SourceTensor

Shape = tuple[int, ...]

# --- tiny models ---------------------------------------------------------------------------------

_SCORES = re.compile(r"(^|[._])(q|k|qk|qkv|query|key|query_key_value)_proj\b|Wqkv|query_key_value")
"""Modules that make queries and keys, which decide where attention looks."""

_SCORE_SCALE = 3.0
_NO_WEIGHT_DEPENDS_ON_THEM = ("auto_map", "rope_scaling", "rope_parameters")


def tiny_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a config.json with the family's first architecture and model type."""
    defaults: dict[str, Any] = {"architectures": [family.architectures[0]]}
    if family.model_types:
        defaults["model_type"] = family.model_types[0]
    return {**defaults, "torch_dtype": "float32", **config}


def write_tiny_model(
    family: Family,
    config: Mapping[str, Any],
    directory: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random checkpoint of the family's own source model, as transformers saves it.

    Tensor names and shapes are those of the model class that runs the source (transformers' or
    ``Family.reference``), independent of the family's rules. The values make mistakes visible:
    norms lie around one and no two are alike, biases are not zero, and queries and keys are large
    enough for attention to prefer some tokens. For sizes that do the same, see
    :class:`FamilyConformance`.

    Args:
        family: names the model class where transformers has none.
        config: the source config.json. ``architectures`` and ``model_type`` may be left out.
        directory: created if missing, and returned.
        dtype: of the weights, by torch's name.
        seed: of the random values.

    Raises:
        PluginError: no model class on this machine makes a model of this config.
    """
    values = tiny_config(family, config)
    try:
        model = _source_model(family, values)
    except Exception as error:  # transformers raises all kinds
        raise PluginError(
            f"family '{family.name}': no source model can be made of the tiny config "
            f"({type(error).__name__}: {error})",
            hint="the config must be one that transformers understands, or the family must name "
            "the class that does: Family(reference='module:class').",
        ) from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_values(name, parameter, generator))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    return directory


def _source_model(family: Family, values: Mapping[str, Any]) -> Any:
    relevant = {k: value for k, value in values.items() if k not in _NO_WEIGHT_DEPENDS_ON_THEM}
    if family.reference is not None:
        model_class: Any = pkgutil.resolve_name(family.reference)
        return model_class(model_class.config_class(**relevant))
    import transformers

    relevant.pop("torch_dtype", None)
    config = transformers.AutoConfig.for_model(**relevant)
    return transformers.AutoModelForCausalLM.from_config(config)


def _random_values(name: str, parameter: Tensor, generator: Any) -> Tensor:
    noise: Tensor = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
        return 1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise
    noise *= parameter.shape[-1] ** -0.5
    return noise * _SCORE_SCALE if _SCORES.search(name) else noise


# --- random models of any size -------------------------------------------------------------------

_POOL, _SHARD = 2**22, 5 * 10**9


def write_random_model(family: Family, config: Mapping[str, Any], directory: Path) -> None:
    """Write config.json and bfloat16 weights (normal, deviation 0.02) of a model of any size.

    Names and shapes are the first alternatives of the family's rules. Tensors repeat a pool of four
    million values, each from a random offset on, so writing runs at disk speed and no two rows are
    alike. The directory is created if missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    values = rng.standard_normal(_POOL, np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16)

    def blocks(entry: TensorEntry) -> Iterator[memoryview]:
        left, start = entry.nbytes // 2, int(rng.integers(_POOL))
        while left:
            block = pool[start : start + left]
            yield block.data
            left, start = left - len(block), 0

    shards: list[list[tuple[str, str, Shape]]] = [[]]
    size = 0
    for name, shape in source_shapes(family, config).items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and size + nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, "BF16", shape))
        size += nbytes
    _write_shards(directory, shards, blocks)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2))


def source_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shapes of the source tensors in the first alternatives of the rules."""
    hf = HFConfig(config)
    translation = family.config_fields().translate(hf)
    if not translation.ok:
        raise UsageError(f"{family.name}: " + "; ".join(f.detail for f in translation.findings))
    return published_shapes(family.weight_rules(translation.fields, hf))


def _write_shards(
    directory: Path,
    shards: Sequence[Sequence[tuple[str, str, Shape]]],
    blocks: Callable[[TensorEntry], Iterator[Any]],
) -> None:
    """Write shards of tensors (name, dtype, shape), named and indexed as transformers does."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        header, entries = encode_header(tensors)
        with (directory / file).open("wb") as out:
            out.write(header)
            for entry in entries.values():
                for block in blocks(entry):
                    out.write(block)
        total += sum(entry.nbytes for entry in entries.values())
        weight_map |= dict.fromkeys(entries, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


# --- the first layers of a real model ------------------------------------------------------------

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?=\.)")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer")
_NOT_PER_LAYER = ("architectures", "bos_token_id", "eos_token_id", "suppress_tokens")


def cut(
    model_dir: str | Path, output_dir: str | Path, *, layers: int, revision: str | None = None
) -> Path:
    """Write a copy of a source model that has only its first layers.

    Only the weights that are kept are read, in blocks, so a model of any size is cut in the memory
    of one block. Shards without kept tensors are left out and the others numbered anew. The
    config's layer count and its lists with one entry per layer are shortened; tokenizer files are
    copied.

    Args:
        model_dir: the source model, a directory or a hub repository.
        output_dir: must not exist, or be empty; returned.
        layers: how many layers to keep, from the first one on.
        revision: of a hub repository.

    Raises:
        UsageError: the model does not have so many layers.
        SourceError: the model cannot be read or its layers cannot be told: their numbers are not 0
            to the config's count, or a list of that many entries has no known meaning.
        OutputError: the output exists, or cannot be written.
    """
    directory, commit = resolve_model_dir(str(model_dir), revision)
    config = read_json_object(directory / "config.json")
    source = open_source(directory, commit)
    count = _layer_count(directory, config)
    if not 1 <= layers <= count:
        raise UsageError(
            f"{directory} has {count} layers; {layers} cannot be kept", hint=f"give 1 to {count}."
        )
    by_file: dict[str, list[tuple[str, str, Shape]]] = {}
    for tensor in _first_layers(directory, source.tensors.values(), count, layers):
        by_file.setdefault(tensor.file, []).append((tensor.name, tensor.dtype, tensor.shape))
    values = _shortened(directory, config, count, layers)
    files = tokenizer_files(directory)
    shards = [by_file[file] for file in sorted(by_file)]
    size = sum(source.tensors[name].nbytes for tensors in shards for name, _, _ in tensors)
    size += sum(file.stat().st_size for file in files)
    target = Path(output_dir)
    with (
        OutputDirectory(target, overwrite=False, required_bytes=size) as output,
        source.open() as reader,
    ):

        def blocks(entry: TensorEntry) -> Iterator[Any]:
            tensor = source.tensors[entry.name]
            rows = tensor.shape[0] if tensor.shape else 1
            for _, block, _ in read_blocks(reader, tensor, 0, rows, tensor.dtype, Event()):
                yield block.data

        _write_shards(output, shards, blocks)
        (output / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for file in files:
            copy_file(file, output)
    return target


def _layer_count(directory: Path, config: Mapping[str, Any]) -> int:
    counts = {key: config[key] for key in _LAYER_COUNTS if isinstance(config.get(key), int)}
    if len(set(counts.values())) != 1:
        raise SourceError(
            f"{directory / 'config.json'}: the number of layers is not clear ({counts or 'none'})",
            hint=f"it is read from {' or '.join(_LAYER_COUNTS)}.",
        )
    return int(next(iter(counts.values())))


def _first_layers(
    directory: Path, tensors: Iterable[SourceTensor], count: int, layers: int
) -> Iterator[SourceTensor]:
    """Yield the tensors of the first layers and of no layer."""
    numbers: set[int] = set()
    for tensor in tensors:
        in_name = [int(match) for match in _LAYER.findall(tensor.name)]
        if len(in_name) > 1:
            raise SourceError(f"{directory}: {tensor.name} names two layers; not understood")
        numbers.update(in_name)
        if not in_name or in_name[0] < layers:
            yield tensor
    if numbers != set(range(count)):
        raise SourceError(
            f"{directory}: the config has {count} layers, but tensor names have the layer numbers "
            f"{', '.join(map(str, sorted(numbers))) or 'none'}",
            hint="only layers numbered from 0 to the config's count can be cut.",
        )


def _shortened(
    directory: Path, config: Mapping[str, Any], count: int, layers: int
) -> dict[str, Any]:
    values = dict(config)
    for key, value in config.items():
        if key in _LAYER_COUNTS:
            values[key] = layers
        elif isinstance(value, list) and len(value) == count and key not in _NOT_PER_LAYER:
            if "layer" not in key:
                raise SourceError(
                    f"{directory / 'config.json'}: {key} has as many entries as there are layers, "
                    "and may or may not have one per layer",
                    hint="cut a copy of the model whose config does not have it.",
                )
            values[key] = value[:layers]
    return values
