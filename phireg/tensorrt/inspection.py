"""Inspect a native engine: its files, and where a GPU can load it, what TensorRT says of it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from phireg.checkpoint.manifest import file_digest
from phireg.children import python_command, query
from phireg.errors import PhiregError
from phireg.files.json import read_json_object
from phireg.files.kinds import file_sizes
from phireg.tensorrt.engine import NativeEngine, read_native
from phireg.tensorrt.package import Backend, load_engine, load_package
from phireg.tensorrt.plan import here

_LOAD_S = 300
_SCRIPT = "from phireg.tensorrt.inspection import main; main()"


@dataclass(frozen=True, slots=True)
class EngineInspection:
    """The content of an engine's directory."""

    engine: NativeEngine
    sizes: Mapping[str, int]  # bytes of every file
    manifest: Mapping[str, Any]  # its phireg-build.json
    layers: tuple[Any, ...] | None  # of the first rank, as TensorRT's inspector tells them
    unloaded: str  # why it was not asked
    problems: tuple[str, ...]  # what differs from the manifest


def inspect_engine(directory: str | Path, *, check: bool = False) -> EngineInspection:
    """Read what a native engine holds; ``check`` compares its files' digests with the manifest."""
    engine = read_native(directory)
    sizes = file_sizes(engine.directory)
    layers, unloaded = _layers(engine)
    problems = tuple(f"{name} {text}" for name, text in file_problems(engine, check=check))
    return EngineInspection(engine, sizes, engine.manifest, layers, unloaded, problems)


def file_problems(engine: NativeEngine, *, check: bool) -> Iterator[tuple[str, str]]:
    """Yield files that are not what was written, and how; ``check`` compares digests."""
    for rank, record in enumerate(engine.records()):
        path = engine.path(rank)
        if path.stat().st_size != record["bytes"]:
            yield path.name, f"has not the {record['bytes']:,} bytes that were written"
        elif check and file_digest(path) != record["digest"]:
            yield path.name, "differs from what was written"


def main() -> None:
    """Write the inspector's JSON of an engine to a file; the arguments: backend, engine, file."""
    backend, path, output = sys.argv[1:]
    try:
        package = load_package(cast(Backend, backend))
        _, engine = load_engine(package, Path(path))
        text = engine.create_engine_inspector().get_engine_information(
            package.trt.LayerInformationFormat.JSON
        )
    except PhiregError as error:
        text = json.dumps({"error": error.message})
    Path(output).write_text(text, encoding="utf-8")


def _layers(engine: NativeEngine) -> tuple[tuple[Any, ...] | None, str]:
    """Ask TensorRT in a process of its own: an engine that does not fit may end the process."""
    if not here():
        return None, "there is no GPU here to load it"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "layers.json")
        command = [
            *python_command(_SCRIPT), engine.backend, str(engine.path(0).resolve()), str(output),
        ]  # fmt: skip
        code, said = query(command, _LOAD_S)
        if code or not output.exists():
            return None, " ".join(said.split()[-40:]) or f"loading it ended with {code}"
        answer = read_json_object(output)
    if "error" in answer:
        return None, str(answer["error"])
    layers = answer.get("Layers")
    return (tuple(layers), "") if isinstance(layers, list) else (None, "it tells no layers")
