"""A real checkpoint cut to its first layers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phireg.errors import SourceError, UsageError
from phireg.files.json import read_json_object
from phireg.files.output import OutputDirectory
from phireg.files.safetensors import encode_header
from phireg.source.hub import resolve_model_dir
from phireg.source.source import Reader, SourceTensor, open_source
from phireg.source.tokenizer_files import CARRIED

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?=\.)")
_COUNTS = ("num_hidden_layers", "n_layer")
_PER_LAYER = re.compile(r"layer")
_NOT_PER_LAYER = ("architectures", "bos_token_id", "eos_token_id", "suppress_tokens")
_BLOCK = 8 * 2**20


def cut(
    model_dir: str | Path, output_dir: str | Path, *, layers: int, revision: str | None = None
) -> Path:
    """Write a copy of a source model that has only its first layers.

    Weights are copied as bytes in blocks of 8 MiB, and only those that are kept are read; a model
    of any size is cut in the memory of one block. Shards stay shards: one without a kept tensor is
    left out, the others are numbered anew. The config's layer count and its lists with one entry
    per layer are shortened, everything else in it is kept; tokenizer files are copied.

    Args:
        model_dir: the source model, a directory or a hub repository.
        output_dir: the directory to make; must not exist, or be empty.
        layers: how many layers to keep, from the first one on.
        revision: of a hub repository.

    Returns:
        ``output_dir``.

    Raises:
        UsageError: the model does not have so many layers.
        SourceError: the model cannot be read, or is laid out in a way that is not understood:
            layer numbers that are not 0 to the config's count, or a list of that many entries
            whose meaning is not known.
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
    kept = _kept(directory, source.tensors.values(), count, layers)
    values = _shortened(directory, config, count, layers)
    carried = [file for name in CARRIED for file in sorted(directory.glob(name)) if file.is_file()]
    size = sum(t.nbytes for t in kept) + sum(file.stat().st_size for file in carried)
    target = Path(output_dir)
    with OutputDirectory(target, overwrite=False, required_bytes=size) as output:
        with source.open() as reader:
            _write_weights(output, kept, reader)
        (output / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for file in carried:
            shutil.copyfile(file, output / file.name)
    return target


def _layer_count(directory: Path, config: Mapping[str, Any]) -> int:
    counts: dict[str, int] = {k: config[k] for k in _COUNTS if isinstance(config.get(k), int)}
    if len(set(counts.values())) != 1:
        raise SourceError(
            f"{directory / 'config.json'}: the number of layers is not clear ({counts or 'none'})",
            hint=f"it is read from {' or '.join(_COUNTS)}.",
        )
    return next(iter(counts.values()))


def _kept(
    directory: Path, tensors: Iterable[SourceTensor], count: int, layers: int
) -> list[SourceTensor]:
    """The tensors of the first layers and of no layer."""
    numbers: set[int] = set()
    kept = []
    for tensor in tensors:
        found = [int(match) for match in _LAYER.findall(tensor.name)]
        if len(found) > 1:
            raise SourceError(f"{directory}: {tensor.name} names two layers; not understood")
        numbers.update(found)
        if not found or found[0] < layers:
            kept.append(tensor)
    if numbers != set(range(count)):
        low, high = (min(numbers), max(numbers)) if numbers else (None, None)
        raise SourceError(
            f"{directory}: the config has {count} layers, the tensors' names number them "
            f"{low} to {high}" + ("" if len(numbers) == count else f" ({len(numbers)} numbers)"),
            hint="only layers numbered from 0 to the config's count can be cut.",
        )
    return kept


def _shortened(
    directory: Path, config: Mapping[str, Any], count: int, layers: int
) -> dict[str, Any]:
    values = dict(config)
    for key, value in config.items():
        if key in _COUNTS:
            values[key] = layers
        elif isinstance(value, list) and len(value) == count and key not in _NOT_PER_LAYER:
            if not _PER_LAYER.search(key):
                raise SourceError(
                    f"{directory / 'config.json'}: {key} has as many entries as there are layers; "
                    "whether it has one per layer is not known",
                    hint="cut a copy of the model whose config does not have it.",
                )
            values[key] = value[:layers]
    return values


def _write_weights(output: Path, kept: list[SourceTensor], reader: Reader) -> None:
    by_file: dict[str, list[SourceTensor]] = {}
    for tensor in kept:
        by_file.setdefault(tensor.file, []).append(tensor)
    single = len(by_file) == 1
    weight_map: dict[str, str] = {}
    for number, file in enumerate(sorted(by_file), 1):
        name = f"model-{number:05d}-of-{len(by_file):05d}.safetensors"
        name = "model.safetensors" if single else name
        tensors = {tensor.name: tensor for tensor in by_file[file]}
        header, entries = encode_header([(t.name, t.dtype, t.shape) for t in tensors.values()])
        with (output / name).open("wb") as out:
            out.write(header)
            for entry in entries.values():
                for start in range(0, entry.nbytes, _BLOCK):
                    block = bytearray(min(_BLOCK, entry.nbytes - start))
                    reader.read_into(tensors[entry.name], start, memoryview(block))
                    out.write(block)
        weight_map |= dict.fromkeys(tensors, name)
    if not single:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in kept)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (output / "model.safetensors.index.json").write_text(text, encoding="utf-8")
