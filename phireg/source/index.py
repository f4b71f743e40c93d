"""The index of a sharded checkpoint, which names the shard of every tensor."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.files.regular import bullets, listed


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A checked ``*.index.json``; shard names are relative paths inside its directory."""

    path: Path
    weight_map: Mapping[str, str]  # tensor name to shard name
    total_size: int | None  # metadata.total_size in bytes; None where absent or no integer

    @property
    def shards(self) -> tuple[str, ...]:
        """The shard names, each once, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def read_index(path: Path, suffix: str) -> ShardIndex:
    """Read ``model.safetensors.index.json`` or the like, and check all that needs no shard."""
    document = read_json_object(path)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise index_error(path, ["weight_map must be an object: tensor name to file name"])
    if defects := list(_map_defects(weight_map, suffix)):
        raise index_error(path, defects)
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return ShardIndex(path, MappingProxyType(weight_map), total if type(total) is int else None)


def shard_defects(index: ShardIndex, held: Mapping[str, Collection[str]]) -> list[str]:
    """Compare the index with the names of the tensors in each shard that could be read."""
    defects = []
    for shard, tensors in held.items():
        expected = [name for name, file in index.weight_map.items() if file == shard]
        absent = [name for name in expected if name not in tensors]
        unlisted = [name for name in tensors if name not in index.weight_map]
        if absent:
            defects.append(f"{shard} lacks tensors listed for it: {listed(absent, len(absent))}")
        if unlisted:
            defects.append(
                f"{shard} holds tensors the index does not list: {listed(unlisted, len(unlisted))}"
            )
        elsewhere: dict[str, list[str]] = {}
        for name in tensors:
            if (file := index.weight_map.get(name, shard)) != shard:
                elsewhere.setdefault(file, []).append(name)
        for file, names in elsewhere.items():
            twice = all(name in held.get(file, ()) for name in names)
            defects.append(
                f"{shard} holds tensors the index lists for {file}"
                f"{', which holds them too' if twice else ''}: {listed(names, len(names))}"
            )
    return defects


def index_error(path: Path, defects: list[str], hint: str | None = None) -> SourceError:
    """Return the error that reports defects of an index and its shards."""
    return SourceError(
        f"{path}: the index and its shards cannot be used:{bullets(defects, 20)}",
        hint=hint or "download the model again; every file of it must come from the same revision",
    )


def _map_defects(weight_map: dict[str, Any], suffix: str) -> Iterator[str]:
    if "" in weight_map:
        yield "weight_map has an entry without a tensor name"
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        yield f"weight_map: the file name is not a string for {listed(wrong, len(wrong))}"
    files = sorted({file for file in weight_map.values() if isinstance(file, str)})
    for file in files:
        if defect := _name_defect(file, suffix):
            yield f"shard name {file[:100]!r} {defect}"


def _name_defect(name: str, suffix: str) -> str | None:
    """Return what is wrong with the text of a shard name.

    Links are not resolved: the Hugging Face cache keeps snapshots as links to blobs elsewhere.
    """
    if not name:
        return "is empty"
    if len(name) > 255:
        return "is too long"
    if "\0" in name or "\\" in name:
        return "contains a NUL or a backslash"
    if name.startswith("/"):
        return "is absolute; shards lie beside their index"
    if ".." in name.split("/"):
        return "leaves the directory"
    if posixpath.normpath(name) != name:
        return "is not a plain relative path"
    if not name.endswith(suffix):
        return f"does not end with {suffix}"
    return None
