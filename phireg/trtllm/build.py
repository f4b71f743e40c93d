"""Plan and build an engine with the installed TensorRT-LLM."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from phireg.checkpoint.inspect import inspect
from phireg.errors import CheckError, EngineError, SourceError
from phireg.files.json import encode_object
from phireg.files.kinds import (
    BUILD_FILE,
    CHECKPOINT,
    ENGINE,
    check_kind,
    file_sizes,
    producer,
    tokenizer_files,
)
from phireg.files.output import OutputDirectory
from phireg.files.regular import bullets
from phireg.files.writing import copy_file, new_log
from phireg.reader.schemes import WEIGHT_ONLY
from phireg.trtllm.builder import Builder, Listener, find_builder, run_builder
from phireg.trtllm.command import PROGRAM, BuildOptions, Command, translate
from phireg.trtllm.engine import Engine, read_engine


class Origin(NamedTuple):
    """What an engine is built from."""

    source: Path  # the checkpoint; for an engine without weights, the model's directory
    config: Mapping[str, Any]  # the checkpoint's config.json
    weight_bytes: int | None  # of the rank files; None for an engine without weights


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The command that builds an engine, and what it was derived from: an ``Origin``."""

    source: Path
    config: Mapping[str, Any]
    weight_bytes: int | None
    output_dir: Path
    version: str  # of TensorRT-LLM
    builder: Builder | None  # None if the plan is for another release than the installed one
    options: BuildOptions
    command: Command

    @property
    def checkpoint(self) -> bool:
        """Return whether the source is a checkpoint; else the engine gets no weights."""
        return self.weight_bytes is not None

    @property
    def line(self) -> tuple[str, ...]:
        """Return the command to show; ``config.json`` stands for the config of an empty engine."""
        program = self.builder.program if self.builder else PROGRAM
        source = self.source if self.checkpoint else Path("config.json")
        return self.command.line(program, source, self.output_dir)

    @property
    def log(self) -> Path:
        """Return the file of the builder's output, beside the engine."""
        return self.output_dir.with_name(f"{self.output_dir.name}.build.log")


@dataclass(frozen=True, slots=True)
class Built:
    """A built engine."""

    engine: Engine
    files: Mapping[str, int]  # every file: bytes
    log: Path  # the builder's output
    seconds: float


def plan_build(
    origin: Origin, output_dir: str | Path, options: BuildOptions, version: str | None
) -> BuildPlan:
    """Decide the command; see :func:`phireg.plan_build`."""
    builder = find_builder() if version is None else None
    version = builder.version if builder else str(version)
    weights = origin.weight_bytes is not None
    command = translate(origin.config, options, version, weights=weights)
    return BuildPlan(*origin, Path(output_dir), version, builder, options, command)


def checkpoint_origin(directory: Path) -> Origin:
    """Check a checkpoint that an engine is to be built from."""
    check_kind(directory, CHECKPOINT)
    inspection = inspect(directory)
    if inspection.problems:
        shown = bullets([*inspection.problems], 10)
        raise CheckError(
            f"{directory} is not what TensorRT-LLM's reader requires{shown}",
            hint=f"phireg inspect {directory} shows all; convert again to put them right.",
        )
    sizes = inspection.sizes.items()
    weight_bytes = sum(n for name, n in sizes if name.endswith(".safetensors"))
    return Origin(directory, inspection.config, weight_bytes)


def build(plan: BuildPlan, *, overwrite: bool = False, listen: Listener | None = None) -> Built:
    """Carry out a plan; the arguments are :func:`phireg.build`'s."""
    if plan.builder is None:
        raise EngineError(f"the plan is for TensorRT-LLM {plan.version}, not the installed one")
    started = time.monotonic()
    quantization = plan.config.get("quantization") or {}
    shrinks = quantization.get("quant_algo") in WEIGHT_ONLY.values()
    needed = (plan.weight_bytes or 0) // (4 if shrinks else 1)
    output = OutputDirectory(
        plan.output_dir, overwrite=overwrite, required_bytes=needed, kind=ENGINE
    )
    with ExitStack() as stack:
        directory = stack.enter_context(output)
        # The builder starts in an empty directory: what lies in ours may be a stranger's.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = plan.source.absolute()
        if not plan.checkpoint:
            source = scratch / "config.json"
            source.write_text(json.dumps(plan.config, indent=4) + "\n", encoding="utf-8")
        line = plan.command.line(plan.builder.program, source, directory)
        _run(plan, line, scratch, directory, listen)
        for file in tokenizer_files(plan.source):
            copy_file(file, directory)
        record = {
            "producer": producer(),
            "trtllm_version": plan.version,
            "source": str(plan.source),
            "weights": plan.checkpoint,
            "options": asdict(plan.options),
            "command": list(line),
            "notes": list(plan.command.notes),
            "run_options": dict(plan.command.run_options),
        }
        (directory / BUILD_FILE).write_bytes(encode_object(record))
        files = file_sizes(directory)
    return Built(read_engine(plan.output_dir), files, plan.log, time.monotonic() - started)


def _run(
    plan: BuildPlan, line: tuple[str, ...], scratch: Path, directory: Path, listen: Listener | None
) -> None:
    """Run the builder; its directory holds a complete engine afterwards."""
    try:
        with new_log(plan.log) as log:
            log.write(os.fsencode(f"{shlex.join(line)}\n"))
            exit_code, last_lines = run_builder(line, log, listen, scratch)
    except OSError as error:
        if error.filename != line[0]:
            raise
        raise EngineError(f"{line[0]} cannot be started: {error.strerror}") from error
    if exit_code:
        ended = f"with {exit_code}" if exit_code > 0 else f"by signal {-exit_code}"
        shown = "".join(f"\n  {text}" for text in last_lines)
        raise EngineError(
            f"{PROGRAM} of TensorRT-LLM {plan.version} ended {ended}; no engine was written{shown}",
            hint=f"its whole output is in {plan.log}; docs/gpu-host.md says what helps.",
        )
    try:
        read_engine(directory)
    except (CheckError, SourceError) as error:
        raise EngineError(
            f"{PROGRAM} ended well, but wrote no complete engine: {error.message}",
            hint=f"its output is in {plan.log}.",
        ) from error
