"""Put the rows of an exporter's checkpoint into the order that TensorRT-LLM's reader wants, once.

The rank files are the source of a plan, whose outputs are the same files with some rows moved.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phireg.checkpoint.inspect import checkpoint_config
from phireg.checkpoint.manifest import write_manifest
from phireg.checkpoint.rankfiles import RankFiles, world_size
from phireg.config.hf import HFConfig
from phireg.conversion.convert import manifest_of
from phireg.conversion.stream import stream
from phireg.errors import CheckError, OutputError, SourceError, UsageError
from phireg.files.kinds import CHECKPOINT, MANIFEST, file_sizes
from phireg.files.output import OutputDirectory
from phireg.files.writing import PARTIAL_SUFFIX, copy_file
from phireg.layout.spans import Span
from phireg.planning.model import DEFAULT_TARGET, Options, Output, Plan, Rows
from phireg.planning.plan import choose_family, plan
from phireg.planning.schedule import schedule
from phireg.postprocessing.detection import Decision, Evidence, check_source, decide
from phireg.postprocessing.orders import (
    PARTS,
    RIGHT,
    TEXTS,
    LinearOrders,
    check_scales,
    linears_of,
    moves,
    quantization_of,
    row_tensors,
)
from phireg.registry import AUTO, FamilyChoice, load_target
from phireg.source.model import Source
from phireg.source.tensors import SourceTensor, WeightsFile

Progress = Callable[[int, int], None]

Moves = Mapping[tuple[int, str], tuple[Span, ...]]
"""By rank and name, the rows of ``rank{r}`` that a tensor gets; others stay as they are."""


@dataclass(frozen=True, slots=True)
class RowOrder:
    """The order of a checkpoint's rows; ``order`` and ``evidence`` are for people."""

    family: str  # that defines the right order
    needed: bool  # phireg postprocess has something to do
    order: str
    linears: int  # concerned
    evidence: tuple[str, ...]  # the deciding one first


@dataclass(frozen=True, slots=True)
class Postprocessed:
    """A checkpoint whose rows were put into the right order."""

    output_dir: Path
    rows: RowOrder  # the order they were in
    tensors: int  # changed, of all ranks
    files: Mapping[str, int]  # every file written: bytes; none where the rows were right


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """An open checkpoint, and the linears that an exporter may have left in another order."""

    directory: Path
    config: Mapping[str, Any]
    files: RankFiles
    chosen: FamilyChoice
    linears: tuple[LinearOrders, ...]
    decision: Decision

    @property
    def rows(self) -> RowOrder:
        family, order = self.chosen.family.name, self.decision.order
        texts = tuple(evidence.text for evidence in self.decision.evidence)
        return RowOrder(family, order != RIGHT, TEXTS[order], len(self.linears), texts)


def row_order(
    checkpoint_dir: str | Path,
    *,
    model_dir: str | None = None,
    family: str = AUTO,
    revision: str | None = None,
) -> RowOrder:
    """Tell whether a checkpoint needs post-processing; nothing is changed.

    Args:
        checkpoint_dir: the checkpoint, of any exporter.
        model_dir: the model it was made from, to compare rows with: a directory, or a repository
            on the Hugging Face hub.
        family: as for :func:`phireg.plan`; ``auto`` decides by the architecture.
        revision: branch, tag or commit of a hub repository.

    Raises:
        UsageError: nothing tells.
        SourceError: the directory is not a checkpoint, or the model cannot be read.
        CheckError: the checkpoint contradicts itself, or is not of this model.
        PluginError: the family cannot be found or loaded.
    """
    with _open(Path(checkpoint_dir), model_dir, family, revision, stated=False) as checkpoint:
        return checkpoint.rows


def postprocess(
    checkpoint_dir: str | Path,
    output_dir: str | Path | None = None,
    *,
    model_dir: str | None = None,
    family: str = AUTO,
    revision: str | None = None,
    in_source_order: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda more, total: None,
) -> Postprocessed:
    """Put the rows of a checkpoint right. The result appears complete, or not at all.

    A checkpoint whose rows are right stays as it is.

    Args:
        checkpoint_dir: the checkpoint.
        output_dir: where the result goes; None replaces the checkpoint once it is complete.
        model_dir: as for :func:`row_order`.
        family: as for :func:`row_order`.
        revision: as for :func:`row_order`.
        in_source_order: state that the rows are in the source's order, where nothing else tells.
        overwrite: replace an existing checkpoint in ``output_dir``.
        progress: takes the number of further bytes of tensors that were written, and of all.

    Raises:
        UsageError: nothing tells, or the rows are right already and there is an ``output_dir``.
        OutputError: the output exists or cannot be written.
        PhiregError: as :func:`row_order`.
    """
    directory = Path(checkpoint_dir)
    resolved = Path(os.path.realpath(directory))
    in_place = output_dir is None
    target = resolved if output_dir is None else Path(output_dir)
    if not in_place and Path(os.path.realpath(target)) == resolved:
        raise UsageError(
            f"--output-dir {output_dir} is the checkpoint itself",
            hint="leave it out to replace the checkpoint.",
        )
    _recover(target)
    with _open(directory, model_dir, family, revision, stated=in_source_order) as checkpoint:
        if not checkpoint.rows.needed:
            if in_place:
                return Postprocessed(directory, checkpoint.rows, 0, {})
            raise UsageError(
                f"{directory} needs no post-processing: {checkpoint.rows.evidence[0]}",
                hint=f"nothing was written to {output_dir}; use {directory} as it is.",
            )
        others = _other_files(checkpoint, in_place=in_place)
        moved = _moves(checkpoint)
        size = sum(path.stat().st_size for path in (*checkpoint.files.paths.values(), *others))
        with OutputDirectory(
            target,
            overwrite=overwrite or in_place,
            required_bytes=size,
            kind=None if in_place else CHECKPOINT,
        ) as unfinished:
            _write(checkpoint, moved, others, unfinished, progress)
            if in_place:
                # Writable while it is filled, whatever the original's mode is.
                unfinished.chmod(directory.stat().st_mode & 0o777 | 0o700)
            sizes = file_sizes(unfinished)
    return Postprocessed(directory if in_place else target, checkpoint.rows, len(moved), sizes)


class _Recovered(Exception):  # noqa: N818 - not an error
    pass


def _recover(target: Path) -> None:
    """Clean up after a killed run, which may hold the only copy of the original."""
    resolved = Path(os.path.realpath(target))
    if Path(f"{resolved}{PARTIAL_SUFFIX}").is_dir():
        output = OutputDirectory(target, overwrite=True, required_bytes=0, kind=None)
        with suppress(_Recovered), output:
            raise _Recovered


@contextmanager
def _open(
    directory: Path, model_dir: str | None, family: str, revision: str | None, *, stated: bool
) -> Iterator[_Checkpoint]:
    """Open a checkpoint and decide the order of its rows."""
    partial = Path(f"{directory}{PARTIAL_SUFFIX}")
    if not directory.exists() and partial.is_dir():
        raise SourceError(
            f"no such directory: {directory}",
            hint=f"a run was killed and left it in {partial}; phireg postprocess without "
            "--check puts it back.",
        )
    config = checkpoint_config(directory)
    if revision is not None and model_dir is None:
        raise UsageError(
            "--revision is of --model-dir, which is not given",
            hint="leave it out, or give --model-dir.",
        )
    with RankFiles(directory, world_size(config)) as files:
        _check_files(config, files)
        source = plan(model_dir, family=family, revision=revision) if model_dir else None
        if source:
            check_source(config, source)
        chosen = source.chosen if source else _family(config, family)
        linears = linears_of(chosen.family, config, files)
        if linears:
            decision = decide(directory, config, files, linears, source, stated=stated)
        else:
            text = f"{chosen.family.name} has no rows that an exporter leaves in another order"
            decision = Decision(RIGHT, (Evidence(True, text),))
        yield _Checkpoint(directory, config, files, chosen, linears, decision)


def _check_files(config: Mapping[str, Any], files: RankFiles) -> None:
    """Refuse rank files that are missing or damaged, or another kind of parallelism."""
    mapping = config.get("mapping")
    tp_size = mapping.get("tp_size", len(files.paths)) if isinstance(mapping, Mapping) else 1
    if tp_size != len(files.paths):
        raise CheckError(
            f"config.json: mapping.world_size is {len(files.paths)} and tp_size {tp_size!r}; "
            "no Phi model has another kind of parallelism"
        )
    for rank, error in files.errors.items():
        if rank and not files.paths[rank].exists():
            raise CheckError(
                error.message,
                hint="modelopt before 0.13 wrote one file for Phi-3-small whatever the TP size, "
                "which no reader divides; quantize again, with phireg quantize or with TP 1.",
            )
        raise CheckError(error.message, hint=error.hint)


def _family(config: Mapping[str, Any], family: str) -> FamilyChoice:
    """Choose the family; a checkpoint's architecture is the name of the source's model class."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    hf = HFConfig({**values, "architectures": [config["architecture"]]})
    try:
        return choose_family(hf, family)
    except SourceError as error:
        raise UsageError(
            f"architecture {config['architecture']}: {error.message}",
            hint="say which family this is: --family NAME.",
        ) from None


def _other_files(checkpoint: _Checkpoint, *, in_place: bool) -> list[Path]:
    """List the files to copy; in place, refuse files that would get lost."""
    directory = checkpoint.directory
    own = {path.name for path in checkpoint.files.paths.values()} | {MANIFEST}
    others = []
    for path in sorted(directory.iterdir()):
        if in_place and (path.is_symlink() or not path.is_file()):
            raise OutputError(
                f"{path} is not a plain file, and would get lost when {directory} is replaced",
                hint="write a new checkpoint with --output-dir, or move it away.",
            )
        if path.name not in own and path.is_file():
            others.append(path)
    return others


def _moves(checkpoint: _Checkpoint) -> Moves:
    files = checkpoint.files
    moved: dict[tuple[int, str], tuple[Span, ...]] = {}
    for orders in checkpoint.linears:
        by_rank = moves(orders.by_name[checkpoint.decision.order], orders.by_name[RIGHT])
        if any(span.source != f"rank{rank}" for rank, rows in enumerate(by_rank) for span in rows):
            check_scales(files, orders, list(row_tensors(files, orders, 0)))
        for rank, rows in enumerate(by_rank):
            for companion in row_tensors(files, orders, rank):
                moved[rank, f"{orders.linear}.{companion}"] = rows
    return moved


def _plan(checkpoint: _Checkpoint, moved: Moves) -> Plan:
    """Plan the rank files anew: every byte in its place, but rows in another order.

    Tensors whose rows do not move are sequences of elements. The ranks have tensors of the same
    names, so a source tensor is ``rank{r}:NAME``.
    """
    tensors: list[SourceTensor] = []
    outputs: list[Output] = []
    headers: list[bytes] = []
    weights: list[WeightsFile] = []
    for rank, file in checkpoint.files.items():
        entries = file.header.entries
        data = min((entry.start for entry in entries.values()), default=file.header.stamp.size)
        headers.append(bytes(file.read_bytes(0, data)))
        for name, entry in entries.items():
            rows = moved.get((rank, name))
            shape = entry.shape if rows else (math.prod(entry.shape),)
            spans = [
                replace(span, source=f"{span.source}:{name}")
                for span in rows or [Span(f"rank{rank}", 0, shape[0])]
            ]
            key = f"rank{rank}:{name}"
            tensors.append(SourceTensor(key, entry.dtype, shape, file.path.name, entry.start))
            outputs.append(Output(rank, name, entry.dtype, shape, entry.start, Rows(tuple(spans))))
        stamp = file.header.stamp
        weights.append(WeightsFile(file.path.name, file.header.digest, stamp))
    by_name = {tensor.name: tensor for tensor in tensors}
    source = Source(checkpoint.directory, by_name, tuple(weights))
    return Plan(
        checkpoint.chosen,
        str(checkpoint.directory),
        Options(tp_size=len(headers)),
        source,
        load_target(DEFAULT_TARGET),
        {"config.json": checkpoint.config},
        tuple(outputs),
        tuple(file.path.name for file in checkpoint.files.values()),
        tuple(headers),
        schedule(outputs, source.tensors),
        (),
    )


def _write(
    checkpoint: _Checkpoint, moved: Moves, others: list[Path], unfinished: Path, progress: Progress
) -> None:
    rewriting = _plan(checkpoint, moved)
    total = rewriting.tensor_bytes
    streamed = stream(rewriting, unfinished, progress=lambda more: progress(more, total))
    for path in others:
        copy_file(path, unfinished)
    for path in (*checkpoint.files.paths.values(), *others):
        (unfinished / path.name).chmod(path.stat().st_mode & 0o777)
    config, decision = checkpoint.config, checkpoint.decision
    manifest = manifest_of(rewriting, unfinished, streamed)
    manifest["options"] = {
        "dtype": config.get("dtype"),
        "tp_size": len(rewriting.headers),
        "quant_algo": quantization_of(config),
        "kv_cache_quant_algo": (config.get("quantization") or {}).get("kv_cache_quant_algo"),
    }
    manifest["postprocess"] = {
        "order": TEXTS[decision.order],
        "across_ranks": decision.order == PARTS,
        "evidence": [evidence.text for evidence in decision.evidence],
        "tensors": sorted({name for _, name in moved}),
    }
    write_manifest(unfinished, manifest)
