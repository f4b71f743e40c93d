"""Putting the rows of an exporter's checkpoint into the order that the reader wants, once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg import registry
from phireg.checkpoint.inspect import checkpoint_config
from phireg.checkpoint.manifest import MANIFEST, file_record, rank_file_record, write_manifest
from phireg.config.hf import HFConfig
from phireg.errors import OutputError, SourceError, UsageError
from phireg.files.output import PARTIAL_SUFFIX, OutputDirectory
from phireg.planning.plan import plan
from phireg.postprocessing.decide import Decision, check_source, decide, linears_of
from phireg.postprocessing.orders import PARTS, RIGHT, TEXTS, Run, runs
from phireg.postprocessing.ranks import Ranks
from phireg.postprocessing.tensors import algorithm_of, check_alike, row_tensors
from phireg.postprocessing.write import Progress, header_bytes, write_rank
from phireg.registry import AUTO, FamilyChoice

if TYPE_CHECKING:
    from phireg.planning.model import Plan


@dataclass(frozen=True, slots=True)
class RowOrder:
    """In which order a checkpoint's rows are.

    Attributes:
        family: the family that knows what the right order is.
        needed: whether ``phireg postprocess`` has something to do.
        order: for people.
        linears: how many linears are concerned.
        evidence: what tells it, the deciding reason first.
    """

    family: str
    needed: bool
    order: str
    linears: int
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Postprocessed:
    """A checkpoint that was put right.

    Attributes:
        output_dir: where it is.
        rows: in which order its rows were, and what told.
        tensors: how many tensors of all ranks were changed.
        files: every file written, with its size in bytes.
    """

    output_dir: Path
    rows: RowOrder
    tensors: int
    files: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Opened:
    directory: Path
    config: Mapping[str, Any]
    ranks: Ranks
    chosen: FamilyChoice
    decision: Decision | None
    """None where the family has no linear whose order can be wrong."""

    @property
    def rows(self) -> RowOrder:
        family = self.chosen.family.name
        if self.decision is None:
            text = f"{family} has no rows here that an exporter leaves in another order"
            return RowOrder(family, False, TEXTS[RIGHT], 0, (text,))
        told = tuple(evidence.text for evidence in self.decision.evidence)
        made = self.decision
        return RowOrder(family, made.needed, TEXTS[made.order], len(made.every), told)


def row_order(
    checkpoint_dir: str | Path,
    *,
    model_dir: str | None = None,
    family: str = AUTO,
    revision: str | None = None,
) -> RowOrder:
    """Tell whether a checkpoint needs post-processing; nothing is changed.

    Args:
        checkpoint_dir: the checkpoint, whoever made it.
        model_dir: the model it was made from, to compare rows with: a directory, or a repository
            on the Hugging Face hub.
        family: as for :func:`phireg.planning.plan`; ``auto`` decides by the architecture.
        revision: branch, tag or commit of a hub repository.

    Raises:
        UsageError: nothing tells.
        SourceError: the directory is not a checkpoint, or the model cannot be read.
        CheckError: the checkpoint contradicts itself, or is not of this model.
        PluginError: the family cannot be found or loaded.
    """
    with _opened(Path(checkpoint_dir), model_dir, family, revision, stated=False) as opened:
        return opened.rows


def postprocess(
    checkpoint_dir: str | Path,
    output_dir: str | Path | None = None,
    *,
    model_dir: str | None = None,
    family: str = AUTO,
    revision: str | None = None,
    in_source_order: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Postprocessed:
    """Put the rows of a checkpoint right. The result appears complete, or not at all.

    Args:
        checkpoint_dir: the checkpoint.
        output_dir: where the result goes; None replaces the checkpoint once it is complete.
        model_dir: as for :func:`row_order`.
        family: as for :func:`row_order`.
        revision: as for :func:`row_order`.
        in_source_order: the user's word for it, where nothing in the checkpoint tells.
        overwrite: replace an existing checkpoint in ``output_dir``.
        progress: told how many more bytes of tensors have been written.

    Raises:
        UsageError: the rows are right already, or nothing tells.
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
    with _opened(directory, model_dir, family, revision, stated=in_source_order) as opened:
        if not opened.rows.needed:
            raise UsageError(
                f"{directory} needs no post-processing: {opened.rows.evidence[0]}",
                hint="nothing was changed.",
            )
        assert opened.decision is not None
        files = _other_files(directory, opened.ranks, in_place=in_place)
        moves = list(_moves(opened.ranks, opened.decision))
        size = sum(header.file_size for header in opened.ranks.headers)
        size += sum(file.stat().st_size for file in files)
        with OutputDirectory(
            target,
            overwrite=overwrite or in_place,
            required_bytes=size,
            objection=(lambda _: None) if in_place else None,
        ) as unfinished:
            _write(opened, moves, files, unfinished, progress or (lambda count: None))
            if in_place:
                # Writable while it is filled, whatever the original's mode is.
                unfinished.chmod(directory.stat().st_mode & 0o777 | 0o700)
            sizes = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
    shown = directory if in_place else target
    return Postprocessed(shown, opened.rows, sum(map(len, moves)), sizes)


def postprocess_bytes(checkpoint_dir: str | Path) -> int:
    """About how much :func:`postprocess` tells its ``progress`` in all."""
    found = Path(checkpoint_dir).glob("rank*.safetensors")
    return sum(file.stat().st_size for file in found if file.is_file())


class _Recovered(Exception):  # noqa: N818 - nothing is wrong
    """Leaves an output directory as it was before the run that was killed."""


def _recover(target: Path) -> None:
    """Put right what a killed run left, which may be the only place where the original is."""
    resolved = Path(os.path.realpath(target))
    if not resolved.with_name(resolved.name + PARTIAL_SUFFIX).is_dir():
        return
    with (
        suppress(_Recovered),
        OutputDirectory(target, overwrite=True, required_bytes=0, objection=lambda _: None),
    ):
        raise _Recovered


@contextmanager
def _opened(
    directory: Path, model_dir: str | None, family: str, revision: str | None, *, stated: bool
) -> Iterator[_Opened]:
    config = _config(directory)
    if revision is not None and model_dir is None:
        raise UsageError(
            "--revision is of --model-dir, which is not given",
            hint="leave it out, or give --model-dir.",
        )
    with Ranks(directory, config) as ranks:
        made: Plan | None = None
        if model_dir is None:
            chosen = _family(config, family)
        else:
            made = plan(model_dir, family=family, revision=revision)
            chosen = made.chosen
            check_source(config, made)
        every = linears_of(chosen.family, config, ranks, directory)
        decision = decide(directory, config, ranks, every, made, stated=stated) if every else None
        yield _Opened(directory, config, ranks, chosen, decision)


def _config(directory: Path) -> dict[str, Any]:
    if not directory.exists():
        partial = directory.with_name(directory.name + PARTIAL_SUFFIX)
        if partial.is_dir():
            raise SourceError(
                f"no such directory: {directory}",
                hint=f"a run was killed and left it in {partial}; phireg postprocess without "
                "--check puts it back.",
            )
    return checkpoint_config(directory)


def _family(config: Mapping[str, Any], family: str) -> FamilyChoice:
    """The family of a checkpoint, whose architecture has the name of the source's model class."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    hf = HFConfig({**values, "architectures": [config["architecture"]]})
    if family == AUTO:
        try:
            return registry.choose(hf)
        except SourceError as error:
            raise UsageError(
                f"no family is known for architecture {config['architecture']}: {error.message}",
                hint="say which: --family NAME.",
            ) from None
    chosen = registry.load(family)
    if reason := chosen.family.refusal(hf):
        raise UsageError(
            f"--family {family} does not fit: {reason}", hint="leave it out to let it be found."
        )
    return chosen


def _moves(ranks: Ranks, decision: Decision) -> Iterator[dict[str, Sequence[Run]]]:
    """For each rank, the tensors whose rows change places."""
    made: list[dict[str, Sequence[Run]]] = [{} for _ in range(len(ranks))]
    for orders in decision.every:
        held, wanted = orders.by_name[decision.order], orders.by_name[RIGHT]
        moved = row_tensors(ranks, orders)
        by_rank = runs(held, wanted)
        if any(run.rank != rank for rank, own in enumerate(by_rank) for run in own):
            check_alike(ranks, orders, moved[0])
        for rank, own in enumerate(by_rank):
            made[rank] |= {f"{orders.target}.{companion}": own for companion in moved[rank]}
    yield from made


def _other_files(directory: Path, ranks: Ranks, *, in_place: bool) -> list[Path]:
    """What is carried along: every other file. In place nothing may get lost."""
    own = {path.name for path in ranks.paths} | {MANIFEST}
    files = []
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not path.is_file():
            if in_place:
                raise OutputError(
                    f"{path} is not a plain file, and would get lost when {directory} is replaced",
                    hint="write a new checkpoint with --output-dir, or move it away.",
                )
            if not path.is_file():
                continue
        if path.name not in own:
            files.append(path)
    return files


def _write(
    opened: _Opened,
    moves: Sequence[Mapping[str, Sequence[Run]]],
    files: Sequence[Path],
    unfinished: Path,
    progress: Progress,
) -> None:
    records = {}
    for rank, path in enumerate(opened.ranks.paths):
        made = unfinished / path.name
        digests = write_rank(opened.ranks, rank, moves[rank], made, progress)
        size = opened.ranks.headers[rank].file_size
        records[path.name] = rank_file_record(header_bytes(opened.ranks, rank), size, digests)
        _copy_mode(path, made)
    for file in files:
        _carry(file, unfinished / file.name)
        records[file.name] = file_record(unfinished / file.name)
    write_manifest(unfinished, _manifest(opened, moves, records))


def _carry(file: Path, made: Path) -> None:
    try:
        shutil.copyfile(file, made)
        _copy_mode(file, made)
    except OSError as error:
        if error.filename != str(file):
            raise  # about the copy: OutputDirectory knows what to say
        raise SourceError(f"{file}: cannot be read ({error.strerror})") from error


def _copy_mode(file: Path, made: Path) -> None:
    made.chmod(file.stat().st_mode & 0o777)


def _manifest(
    opened: _Opened, moves: Sequence[Mapping[str, Sequence[Run]]], records: Mapping[str, Any]
) -> dict[str, Any]:
    candidate, decision = opened.chosen.candidate, opened.decision
    assert decision is not None
    quantization = opened.config.get("quantization") or {}
    headers = opened.ranks.headers
    return {
        "producer": {"name": "phireg", "version": metadata.version("phireg")},
        "family": {
            "name": opened.chosen.family.name,
            "distribution": candidate.distribution,
            "version": candidate.version,
        },
        "options": {
            "dtype": opened.config.get("dtype"),
            "tp_size": len(headers),
            "quant_algo": algorithm_of(opened.config),
            "kv_cache_quant_algo": quantization.get("kv_cache_quant_algo"),
        },
        "source": {
            "model_dir": str(opened.directory),
            "revision": None,
            "files": [
                {"name": path.name, "size": header.file_size, "header": header.digest}
                for path, header in zip(opened.ranks.paths, headers, strict=True)
            ],
        },
        "postprocess": {
            "order": TEXTS[decision.order],
            "across_ranks": decision.order == PARTS,
            "evidence": [evidence.text for evidence in decision.evidence],
            "tensors": sorted({name for rank in moves for name in rank}),
        },
        "files": dict(records),
    }
