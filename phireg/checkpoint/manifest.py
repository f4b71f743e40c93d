"""The manifest ``phireg.json``: where a checkpoint came from, and digests of what was written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from phireg.checkpoint.rankfiles import RankFile
from phireg.errors import SourceError
from phireg.files.json import encode_object, read_json_object
from phireg.files.kinds import MANIFEST
from phireg.files.regular import open_file
from phireg.findings import first

FORMAT = 1
_BLOCK = 4 * 1024 * 1024


Progress = Callable[[int], None]
"""Called with the number of further bytes that were read."""


def file_digest(path: Path, progress: Progress | None = None, *, inside: Path | None = None) -> str:
    """Return xxh3_128 of a whole file, in hexadecimal; ``inside`` is that of ``open_regular``."""
    digest = xxhash.xxh3_128()
    with open_file(path, inside=inside) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def rank_file_record(header: bytes, size: int, tensors: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of a rank file; header and tensors have a digest of their own each."""
    return {
        "size": size,
        "header": xxhash.xxh3_128(header).hexdigest(),
        "tensors": dict(sorted(tensors.items())),
    }


def file_record(path: Path) -> dict[str, Any]:
    """Return the record of any other file."""
    return {"size": path.stat().st_size, "digest": file_digest(path)}


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest."""
    document = {"format": FORMAT, "hash": "xxh3_128", **content}
    (directory / MANIFEST).write_bytes(encode_object(document))


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest, or None if there is none."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return None
    manifest = read_json_object(path)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise SourceError(
            f"{path} has format {manifest.get('format')!r}; this phireg knows format {FORMAT}",
            hint="use the phireg that wrote the checkpoint, or convert it again.",
        )
    if wrong := list(_wrong_types(manifest)):
        raise SourceError(
            f"{path}: {', '.join(first(wrong, 5))} of another type than phireg writes",
            hint="convert the model again, or remove the file: it is not needed to run it.",
        )
    return manifest


def _wrong_types(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the places of a manifest that do not have the type that their readers rely on."""
    for key in ("producer", "family", "options", "source", "quantization", "postprocess"):
        if not isinstance(manifest.get(key, {}), Mapping):
            yield key
    source = manifest.get("source")
    if isinstance(source, Mapping) and not isinstance(source.get("files", []), list):
        yield "source.files"
    for name, record in manifest["files"].items():
        ranked = isinstance(record, Mapping) and "tensors" in record
        types = {
            "size": int,
            **({"header": str, "tensors": Mapping} if ranked else {"digest": str}),
        }
        if not isinstance(record, Mapping) or any(
            not isinstance(record.get(key), kind) for key, kind in types.items()
        ):
            yield f"files.{name[:200]}"


def check_files(
    directory: Path, manifest: Mapping[str, Any], progress: Progress | None = None
) -> Iterator[str]:
    """Read every file the manifest lists and yield what differs from it."""
    for name, record in manifest["files"].items():
        path = directory / name
        if Path(name).name != name:
            yield f"{name!r} is not a file name"
        elif not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != record.get("size"):
            yield f"{name} has {path.stat().st_size} bytes, the manifest says {record.get('size')}"
        elif "tensors" in record:
            yield from _check_rank_file(path, record, progress)
        elif file_digest(path, progress) != record.get("digest"):
            yield f"{name} differs from what was written"
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in manifest["files"]:
            yield f"{path.name} is not in the manifest"


def check_weights(
    directory: Path, manifest: Mapping[str, Any], progress: Progress | None = None
) -> Iterator[str]:
    """Read the weight files that the manifest lists, and yield what differs from it."""
    files = {name: record for name, record in manifest["files"].items() if "tensors" in record}
    return check_files(directory, {"files": files}, progress)


def _check_rank_file(
    path: Path, record: Mapping[str, Any], progress: Progress | None
) -> Iterator[str]:
    try:
        file = RankFile(path)
    except SourceError as error:
        yield error.message
        return
    with file:
        if file.header.digest != record["header"]:
            yield f"{path.name}: header differs from what was written"
            return
        for name in file.header.entries:
            digest = file.digest(name, progress) if progress else file.digest(name)
            if digest != record["tensors"].get(name):
                yield f"{path.name}: {name} differs from what was written"
