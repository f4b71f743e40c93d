"""Inspect a checkpoint: its config, its tensors, its manifest, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phireg.checkpoint.manifest import Progress, check_files, read_manifest
from phireg.checkpoint.rankfiles import RankFiles, world_size
from phireg.checkpoint.shards import SURPLUS, Shards, read_directory
from phireg.errors import CheckError, SourceError
from phireg.files.json import read_json_object
from phireg.files.kinds import CHECKPOINT, HF_MODEL, check_kind, file_sizes
from phireg.reader.layouts import Layout
from phireg.reader.structure import structure_findings
from phireg.reader.tensors import Kind


@dataclass(frozen=True, slots=True)
class Inspection:
    """The content of a checkpoint directory.

    Attributes:
        config: its config.json.
        weights: dtype and shape by tensor name, by file name: every rank file in order, or the
            shards of a Hugging Face directory; none of a file that cannot be read.
        sizes: bytes of every file.
        manifest: its ``phireg.json``, or None if it has none.
        problems: what the reader would reject, and (if asked for) what differs from the manifest.
        layout: the quantization of a Hugging Face directory.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Mapping[str, Kind]]
    sizes: Mapping[str, int]
    manifest: Mapping[str, Any] | None
    problems: tuple[str, ...]
    layout: Layout | None = None

    @property
    def ranks(self) -> tuple[Mapping[str, Kind], ...]:
        """The tensors of every rank file; of a Hugging Face directory there are none."""
        return () if self.config.get("architecture") is None else tuple(self.weights.values())


def inspect(
    checkpoint_dir: str | Path, *, check: bool = False, progress: Progress | None = None
) -> Inspection:
    """Read what a checkpoint holds, from headers only unless ``check`` is set.

    Args:
        checkpoint_dir: a TensorRT-LLM checkpoint, or a Hugging Face directory.
        check: read all files and compare them with the manifest.
        progress: called with the number of further bytes that were compared.

    Raises:
        SourceError: it is not a checkpoint.
    """
    directory = Path(checkpoint_dir)
    layout = None
    if check_kind(directory, CHECKPOINT, HF_MODEL) is HF_MODEL:
        config, weights, problems, layout = _read_shards(directory)
    else:
        config = checkpoint_config(directory)
        with RankFiles(directory, world_size(config)) as files:
            ranks = files.kinds()
            weights = {files.paths[n].name: kinds for n, kinds in enumerate(ranks)}
            problems = [error.message for error in files.errors.values()]
            problems += [f"{name}: {text}" for name, text in files.surplus()]
        for where, text, harmless in structure_findings(config, ranks):
            if not harmless:
                problems.append(f"{where}: {text}")
    manifest = read_manifest(directory)
    if check:
        if manifest is None:
            raise SourceError(
                f"{directory} has no phireg.json to check against",
                hint="only checkpoints written by phireg carry digests.",
            )
        # What cannot be read, or is no file of the model, was said above.
        known = [name for name, tensors in weights.items() if not tensors]
        known += [x.name for x in directory.glob("*.safetensors") if x.name not in weights]
        found = check_files(directory, manifest, progress)
        more = (text for text in found if not text.startswith(tuple(known)))
        problems = list(dict.fromkeys([*problems, *more]))
    sizes = file_sizes(directory)
    return Inspection(config, weights, sizes, manifest, tuple(problems), layout)


def _read_shards(
    directory: Path,
) -> tuple[dict[str, Any], dict[str, Mapping[str, Kind]], list[str], Layout | None]:
    """Return config.json, the tensors of each file, what is wrong, and the quantization."""
    config = read_json_object(directory / "config.json")
    with Shards(directory, strict=False) as shards:
        weights: dict[str, Mapping[str, Kind]] = {
            name: shards.files[name].kinds() if name in shards.files else {}
            for name in shards.names
        }
        kinds = shards.kinds()
        problems = [*shards.defects, *(f"{name}: {SURPLUS}" for name in shards.surplus())]
    try:
        whole = read_directory(directory)
    except CheckError as error:
        return config, weights, [*problems, error.message], None
    if not shards.defects:  # what a damaged file should hold is not missing besides
        problems += [f"{d.name}: {d.text}" for d in whole.deviations(kinds) if not d.harmless]
    return config, weights, problems, whole.layout


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
