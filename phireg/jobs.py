"""What the command line does, as functions for people who script.

>>> from phireg import jobs
>>> planned = jobs.plan("./Phi-3-small-8k-instruct", family="phi3-small", tp_size=2)
>>> jobs.convert(planned, "./ckpt")  # doctest: +SKIP

All raise subclasses of :class:`phireg.errors.PhiregError` for anything that is wrong with the
input; nothing else is expected.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from phireg import registry
from phireg.checkpoint.carried import CARRIED
from phireg.checkpoint.header import read_header
from phireg.checkpoint.hub import resolve_model_dir
from phireg.checkpoint.jsonfile import read_json_object
from phireg.checkpoint.manifest import (
    check_files,
    file_record,
    rank_file_record,
    read_manifest,
    write_manifest,
)
from phireg.checkpoint.source import open_source
from phireg.config.hf import HFConfig
from phireg.errors import PhiregError, PlanError, PluginError, SourceError, UsageError
from phireg.family import Family
from phireg.layout.spans import LayoutError
from phireg.plan.admit import check_model
from phireg.plan.build import build_plan, tp_sizes
from phireg.plan.model import DTYPES, Options, Output, Plan
from phireg.plan.report import problems
from phireg.quant.schemes import WEIGHT_ONLY
from phireg.registry import AUTO, Candidate, Chosen
from phireg.runner.cast import Loss
from phireg.runner.directory import OutputDirectory
from phireg.runner.stream import Progress, Streamed, stream
from phireg.verify.result import CHECKS, Verification
from phireg.verify.structure import structure_problems


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, who made it, and the request behind it.

    Attributes:
        plan: the plan; look at ``plan.errors`` before converting.
        chosen: the family and the distribution that provides it.
        model_dir: what was asked for, a directory or a hub repository.
    """

    plan: Plan
    chosen: Chosen
    model_dir: str


@dataclass(frozen=True, slots=True)
class Converted:
    """A finished conversion.

    Attributes:
        output_dir: the checkpoint.
        files: every file written, with its size in bytes.
        losses: values that became infinite or zero in a cast, by source tensor.
    """

    output_dir: Path
    files: Mapping[str, int]
    losses: Mapping[str, Loss]


def plan(
    model_dir: str | Path,
    *,
    family: str = AUTO,
    revision: str | None = None,
    dtype: str = "auto",
    tp_size: int = 1,
    pp_size: int = 1,
    weight_only: str | None = None,
) -> Planned:
    """Plan a conversion from config.json and file headers alone.

    Args:
        model_dir: a directory, or a repository on the Hugging Face hub.
        family: a family name, ``distribution:name``, or ``auto`` to decide by config.json.
        revision: branch, tag or commit of a hub repository.
        dtype: ``auto``, ``float16``, ``bfloat16`` or ``float32``.
        tp_size: number of tensor-parallel ranks.
        pp_size: must be 1.
        weight_only: ``int8`` or ``int4`` for the portable weight-only form.

    Raises:
        UsageError: an option has a value that makes no sense.
        SourceError: the model cannot be read, or is not one phireg converts.
        PluginError: the family cannot be found or loaded.
    """
    options = _options(dtype, tp_size, pp_size, weight_only)
    directory, commit = resolve_model_dir(str(model_dir), revision)
    if directory.is_dir() and not (directory / "config.json").exists():
        open_source(directory)  # may know better what this directory is
    hf = HFConfig(read_json_object(directory / "config.json"))
    if not hf.architectures and not hf.model_type:
        open_source(directory)
    check_model(hf)
    chosen = registry.choose(hf) if family == AUTO else registry.load(family)
    refusal = chosen.family.refusal(hf)
    if refusal:
        raise SourceError(
            f"this model cannot be converted as {chosen.family.name}: {refusal}",
            hint="leave out --family to let config.json decide.",
        )
    source = open_source(directory, commit)
    built = build_plan(chosen.family, hf, source, options)
    return Planned(built, chosen, str(model_dir))


def _options(dtype: str, tp_size: int, pp_size: int, weight_only: str | None) -> Options:
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", hint=f"known: auto, {', '.join(DTYPES)}.")
    if weight_only is not None and weight_only not in WEIGHT_ONLY:
        raise UsageError(
            f"unknown weight-only precision '{weight_only}'",
            hint=f"known: {', '.join(WEIGHT_ONLY)}.",
        )
    if tp_size < 1:
        raise UsageError(f"tp size {tp_size} is not a number of ranks", hint="use 1 or more.")
    if pp_size != 1:
        raise UsageError(
            f"pipeline parallelism ({pp_size} stages) is not possible for Phi: TensorRT-LLM's Phi "
            "models create the embedding and the head on every rank and pass nothing between "
            "stages",
            hint="use --tp-size instead.",
        )
    return Options(dtype, tp_size, weight_only)


def convert(
    planned: Planned,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    allow_overflow: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Carry out a plan. The output appears under its name complete, or not at all.

    Args:
        planned: from :func:`plan`.
        output_dir: the checkpoint to make; must not exist, or be empty.
        overwrite: replace it, if it is recognisably a checkpoint, once the new one is complete.
        allow_overflow: let finite values become infinite in a cast.
        progress: told how many more bytes have been written; called from worker threads.

    Raises:
        PlanError: the plan has errors, or a cast overflowed.
        SourceError: a source file changed or could not be read.
        OutputError: the output exists, or cannot be written.
    """
    made = planned.plan
    if made.errors:
        raise PlanError(
            f"the plan has {len(made.errors)} problem{'s' if len(made.errors) > 1 else ''}; "
            f"nothing was written\n{problems(made.errors)}"
        )
    carried = [
        file
        for name in CARRIED
        for file in sorted(made.source.directory.glob(name))
        if file.is_file()
    ]
    size = made.bytes_out + sum(file.stat().st_size for file in carried)
    target = Path(output_dir)
    with OutputDirectory(target, overwrite=overwrite, required_bytes=size) as directory:
        streamed = stream(made, directory, progress=progress)
        if not allow_overflow:
            _check_overflow(streamed, made)
        for file in carried:
            _carry(file, directory)
        config = json.dumps(made.config, indent=4) + "\n"
        (directory / "config.json").write_text(config, encoding="utf-8")
        write_manifest(directory, _manifest(planned, directory, streamed))
        files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    return Converted(target, files, streamed.losses)


def _carry(file: Path, directory: Path) -> None:
    try:
        shutil.copyfile(file, directory / file.name)
    except OSError as error:
        if error.filename != str(file):
            raise  # about the copy: OutputDirectory knows what to say
        raise SourceError(f"{file}: cannot be read ({error.strerror})") from error


def _check_overflow(streamed: Streamed, made: Plan) -> None:
    lost = {name: loss.overflowed for name, loss in streamed.losses.items() if loss.overflowed}
    if lost:
        raise PlanError(
            f"{sum(lost.values())} finite values do not fit into {made.options.dtype}; "
            "nothing was written\n"
            + "\n".join(f"  overflow  {name}: {count} values" for name, count in lost.items()),
            hint="choose another --dtype, or --allow-overflow to write them as infinite.",
        )


def _manifest(planned: Planned, directory: Path, streamed: Streamed) -> dict[str, Any]:
    made, candidate = planned.plan, planned.chosen.candidate
    ranks: dict[str, Any] = {}
    for rank, (header, size) in enumerate(zip(made.headers, made.file_sizes, strict=True)):
        tensors = {name: d for (r, name), d in streamed.digests.items() if r == rank}
        ranks[f"rank{rank}.safetensors"] = rank_file_record(header, size, tensors)
    others = {
        file.name: file_record(file)
        for file in sorted(directory.iterdir())
        if file.name not in ranks
    }
    return {
        "producer": {"name": "phireg", "version": metadata.version("phireg")},
        "family": {
            "name": made.family,
            "distribution": candidate.distribution,
            "version": candidate.version,
        },
        "options": {
            "dtype": made.options.dtype,
            "tp_size": made.options.tp_size,
            "weight_only": made.options.weight_only,
        },
        "source": {
            "model_dir": planned.model_dir,
            "revision": made.source.revision,
            "files": [
                {"name": f.name, "size": f.size, "header": f.header_digest}
                for f in made.source.files
            ],
        },
        "files": {**others, **ranks},
    }


def explain(planned: Planned, tensor: str) -> tuple[Output, ...]:
    """The outputs a name stands for: a tensor of every rank, or all tensors of a module.

    Raises:
        PlanError: the plan has errors.
        UsageError: no output has that name.
    """
    made = planned.plan
    if made.errors:
        raise PlanError(f"the plan has problems\n{problems(made.errors)}")
    found = tuple(o for o in made.outputs if o.name == tensor or o.name.startswith(f"{tensor}."))
    if not found:
        import difflib

        names = sorted({o.name for o in made.outputs})
        near = difflib.get_close_matches(tensor, names, 3, 0.5)
        raise UsageError(
            f"the checkpoint has no tensor or module '{tensor}'",
            hint=f"perhaps {' or '.join(near)}."
            if near
            else "phireg plan --json lists all of them.",
        )
    return found


@dataclass(frozen=True, slots=True)
class FamilyInfo:
    """A family as ``phireg families`` shows it.

    Attributes:
        candidate: who offers it.
        family: the loaded family, or None if it cannot be loaded.
        tp_sizes: for each published model, the numbers of ranks that work.
        problem: why it cannot be loaded, if so.
    """

    candidate: Candidate
    family: Family | None
    tp_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    problem: str | None = None


def families() -> tuple[FamilyInfo, ...]:
    """Every family that is offered, loaded where that works."""
    infos = []
    for candidate in (c for offers in registry.index().values() for c in offers):
        try:
            family = candidate.load()
            sizes = {m.repo_id: _published_sizes(family, m.config) for m in family.published}
        except (PluginError, LayoutError) as error:
            infos.append(FamilyInfo(candidate, None, problem=str(error)))
        else:
            infos.append(FamilyInfo(candidate, family, sizes))
    return tuple(infos)


def _published_sizes(family: Family, config: Mapping[str, Any]) -> tuple[int, ...]:
    hf = HFConfig(config)
    return tuple(tp_sizes(family.weight_rules(family.config_fields().translate(hf).fields, hf)))


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint directory holds.

    Attributes:
        config: its config.json.
        ranks: for every rank file in order, dtype and shape by tensor name.
        sizes: bytes of every file.
        manifest: its ``phireg.json``, or None if it has none.
        problems: what the reader would reject, and (if asked for) what differs from the manifest.
    """

    config: Mapping[str, Any]
    ranks: tuple[Mapping[str, tuple[str, tuple[int, ...]]], ...]
    sizes: Mapping[str, int]
    manifest: Mapping[str, Any] | None
    problems: tuple[str, ...]


def inspect(
    checkpoint_dir: str | Path, *, check: bool = False, progress: Progress | None = None
) -> Inspection:
    """Look into a TensorRT-LLM checkpoint.

    Args:
        checkpoint_dir: the directory.
        check: read all files and compare them with the manifest.
        progress: told how many more bytes have been compared.

    Raises:
        SourceError: it is not a checkpoint.
    """
    directory = Path(checkpoint_dir)
    if not directory.is_dir():
        raise SourceError(f"no such directory: {directory}")
    config = read_json_object(directory / "config.json")
    if not isinstance(config.get("architecture"), str):
        raise SourceError(
            f"{directory} is not a TensorRT-LLM checkpoint: its config.json has no 'architecture'",
            hint="phireg inspect looks at the output of phireg convert; for a source model use "
            "phireg plan.",
        )
    mapping = config.get("mapping")
    world = mapping.get("world_size", 1) if isinstance(mapping, dict) else 1
    if not isinstance(world, int) or not 0 < world <= 4096:
        raise SourceError(f"{directory / 'config.json'}: mapping.world_size is {world!r}")
    found: list[str] = []
    ranks = tuple(_rank_tensors(directory / f"rank{n}.safetensors", found) for n in range(world))
    manifest = read_manifest(directory)
    found += [f"{where}: {what}" for where, what in structure_problems(config, ranks)]
    if check:
        if manifest is None:
            raise SourceError(
                f"{directory} has no phireg.json to check against",
                hint="only checkpoints written by phireg carry digests.",
            )
        found += check_files(directory, manifest, progress)
    sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    return Inspection(config, ranks, sizes, manifest, tuple(found))


def _rank_tensors(path: Path, problems: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape by name; empty, with a further problem, for a file that cannot be read."""
    try:
        header = read_header(path)
    except SourceError as error:
        problems.append(error.message)
        return {}
    return {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}


def verify(
    checkpoint_dir: str | Path,
    model_dir: str | Path,
    *,
    family: str = AUTO,
    revision: str | None = None,
    checks: Collection[str] = tuple(CHECKS),
    device: str = "cpu",
    dtype: str = "float32",
    max_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Prove a checkpoint to be its source, or say where it is not; see docs/verify.md.

    Args:
        checkpoint_dir: the checkpoint, whoever made it.
        model_dir: the source: a directory, or a repository on the Hugging Face hub.
        family: as for :func:`plan`.
        revision: branch, tag or commit of a hub repository.
        checks: names out of ``phireg.verify.result.CHECKS``.
        device: where logits are computed, ``cpu`` or ``cuda``.
        dtype: in which dtype; float32 compares sharpest.
        max_tokens: most tokens of a prompt; None for what a stated budget allows.
        progress: told (check, how much more is done, how much there is in all), perhaps from
            worker threads.

    Raises:
        UsageError: an unknown check, device or dtype.
        SourceError: the checkpoint is none, or the source cannot be read.
        PluginError: the family cannot be found or loaded.
    """
    from phireg.verify.request import Request
    from phireg.verify.run import run

    request = Request(
        Path(checkpoint_dir), str(model_dir), family, revision, checks, device, dtype, max_tokens
    )
    return run(request, progress)


__all__ = [
    "Converted",
    "FamilyInfo",
    "Inspection",
    "PhiregError",
    "Planned",
    "convert",
    "explain",
    "families",
    "inspect",
    "plan",
    "verify",
]
