"""Inspect a checkpoint: its config, its tensors, its manifest, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phireg.checkpoint.manifest import Progress, check_files, read_manifest
from phireg.checkpoint.rankfiles import RankFiles, world_size
from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.files.kinds import CHECKPOINT, check_kind, file_sizes
from phireg.reader.structure import structure_findings
from phireg.reader.tensors import Kind


@dataclass(frozen=True, slots=True)
class Inspection:
    """The content of a checkpoint directory.

    Attributes:
        config: its config.json.
        ranks: for every rank file in order, dtype and shape by tensor name.
        sizes: bytes of every file.
        manifest: its ``phireg.json``, or None if it has none.
        problems: what the reader would reject, and (if asked for) what differs from the manifest.
    """

    config: Mapping[str, Any]
    ranks: tuple[Mapping[str, Kind], ...]
    sizes: Mapping[str, int]
    manifest: Mapping[str, Any] | None
    problems: tuple[str, ...]


def inspect(
    checkpoint_dir: str | Path, *, check: bool = False, progress: Progress | None = None
) -> Inspection:
    """Read what a TensorRT-LLM checkpoint holds, from headers only unless ``check`` is set.

    Args:
        checkpoint_dir: the directory.
        check: read all files and compare them with the manifest.
        progress: called with the number of further bytes that were compared.

    Raises:
        SourceError: it is not a checkpoint.
    """
    directory = Path(checkpoint_dir)
    config = checkpoint_config(directory)
    with RankFiles(directory, world_size(config)) as files:
        ranks = tuple(files.kinds())
        problems = [error.message for error in files.errors.values()]
    manifest = read_manifest(directory)
    for where, text, harmless in structure_findings(config, ranks):
        if not harmless:
            problems.append(f"{where}: {text}")
    if check:
        if manifest is None:
            raise SourceError(
                f"{directory} has no phireg.json to check against",
                hint="only checkpoints written by phireg carry digests.",
            )
        problems += check_files(directory, manifest, progress)
    sizes = file_sizes(directory)
    return Inspection(config, ranks, sizes, manifest, tuple(problems))


def checkpoint_config(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json; the error for anything else says what it is."""
    check_kind(directory, CHECKPOINT)
    config = read_json_object(directory / "config.json")
    if not isinstance(config.get("architecture"), str):
        raise SourceError(
            f"{directory / 'config.json'} has no 'architecture'",
            hint="phireg convert and phireg quantize write checkpoints.",
        )
    return config
