"""Building an engine with the installed TensorRT-LLM."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from phireg.checkpoint.inspect import inspect
from phireg.errors import CheckError, EngineError, OutputError, SourceError
from phireg.files.output import OutputDirectory
from phireg.planning.plan import plan_config
from phireg.reader.schemes import WEIGHT_ONLY
from phireg.registry import AUTO
from phireg.source.tokenizer_files import CARRIED
from phireg.trtllm.command import PROGRAM, BuildOptions, Command, translate
from phireg.trtllm.diagnose import known_failure, last_lines
from phireg.trtllm.engine import BUILD_FILE, Engine, not_an_engine, read_engine
from phireg.trtllm.locate import Builder, find_builder
from phireg.trtllm.process import Listener, run

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """How an engine will be built.

    Attributes:
        source: the checkpoint, or for an engine without weights the model's directory.
        config: the checkpoint's config.json.
        weights: whether there are weights.
        weight_bytes: how large they are.
        output_dir: where the engine goes.
        version: of TensorRT-LLM.
        builder: what runs; None if the plan is for another release than the installed one.
        options: what was asked for.
        command: what becomes of it.
    """

    source: Path
    config: Mapping[str, Any]
    weights: bool
    weight_bytes: int
    output_dir: Path
    version: str
    builder: Builder | None
    options: BuildOptions
    command: Command

    @property
    def line(self) -> tuple[str, ...]:
        """The command for a reader; ``config.json`` stands for the config of an empty engine."""
        program = self.builder.program if self.builder else PROGRAM
        source = self.source if self.weights else Path("config.json")
        return self.command.line(program, source, self.output_dir)

    @property
    def log(self) -> Path:
        """Where the builder's output goes, beside the engine."""
        return self.output_dir.with_name(f"{self.output_dir.name}.build.log")


@dataclass(frozen=True, slots=True)
class Built:
    """A built engine.

    Attributes:
        engine: what it says of itself.
        files: every file, with its size in bytes.
        log: the builder's output.
        seconds: how long it took.
    """

    engine: Engine
    files: Mapping[str, int]
    log: Path
    seconds: float


def plan_build(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    options: BuildOptions | None = None,
    *,
    version: str | None = None,
) -> BuildPlan:
    """Check a checkpoint and decide the builder's command.

    Args:
        checkpoint_dir: the checkpoint.
        output_dir: where the engine will go.
        options: what is asked for.
        version: the TensorRT-LLM release to plan for; None is the installed one.

    Raises:
        SourceError: that is no checkpoint.
        CheckError: TensorRT-LLM's reader would reject it, or read it wrongly.
        UsageError: the options contradict each other or the checkpoint.
        EngineError: no builder is installed, or this release cannot build it.
    """
    found = inspect(checkpoint_dir)
    if found.problems:
        shown = "\n".join(f"  {problem}" for problem in found.problems[:_SHOWN_PROBLEMS])
        more = len(found.problems) - _SHOWN_PROBLEMS
        raise CheckError(
            f"{checkpoint_dir} is not what TensorRT-LLM's reader requires\n{shown}"
            + (f"\n  and {more} more" if more > 0 else ""),
            hint=f"phireg inspect {checkpoint_dir} shows all; convert again to put them right.",
        )
    size = sum(n for name, n in found.sizes.items() if name.endswith(".safetensors"))
    return _plan(Path(checkpoint_dir), found.config, size, output_dir, options, version)


def plan_empty_build(
    model_dir: str | Path,
    output_dir: str | Path,
    options: BuildOptions | None = None,
    *,
    family: str = AUTO,
    dtype: str = "auto",
    version: str | None = None,
) -> BuildPlan:
    """As :func:`plan_build`, for an engine without weights, from the model's config.json alone.

    The number of ranks is ``options.tp_size``.

    Raises:
        PlanError: the config has errors.
        PhiregError: as :func:`plan_build`; or as :func:`phireg.planning.plan`.
    """
    ranks = (options and options.tp_size) or 1
    plan = plan_config(model_dir, family=family, dtype=dtype, tp_size=ranks)
    return _plan(Path(model_dir), plan.config, None, output_dir, options, version)


def _plan(
    source: Path,
    config: Mapping[str, Any],
    weight_bytes: int | None,
    output_dir: str | Path,
    options: BuildOptions | None,
    version: str | None,
) -> BuildPlan:
    options = options or BuildOptions()
    builder = find_builder() if version is None else None
    version = builder.version if builder else str(version)
    weights = weight_bytes is not None
    command = translate(config, options, version, weights=weights)
    return BuildPlan(
        source=source,
        config=config,
        weights=weights,
        weight_bytes=weight_bytes or 0,
        output_dir=Path(output_dir),
        version=version,
        builder=builder,
        options=options,
        command=command,
    )


def build(plan: BuildPlan, *, overwrite: bool = False, listen: Listener | None = None) -> Built:
    """Carry out a plan. The engine appears under its name complete, or not at all.

    Whatever ends this early, a signal included, ends the builder and its workers too.

    Args:
        plan: for the installed release.
        overwrite: replace an existing engine once the new one is complete.
        listen: told each line of the builder's output.

    Raises:
        EngineError: the build failed.
        OutputError: the output exists, or cannot be written.
        SourceError: a tokenizer file of the source cannot be read.
    """
    if plan.builder is None:
        raise EngineError(f"the plan is for TensorRT-LLM {plan.version}, not the installed one")
    started = time.monotonic()
    quantization = plan.config.get("quantization") or {}
    built_down = quantization.get("quant_algo") in WEIGHT_ONLY.values()
    with ExitStack() as stack:
        directory = stack.enter_context(
            OutputDirectory(
                plan.output_dir,
                overwrite=overwrite,
                required_bytes=plan.weight_bytes // (4 if built_down else 1),
                kind="engine",
                objection=not_an_engine,
            )
        )
        source = plan.source
        if not plan.weights:
            source = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "config.json"
            source.write_text(json.dumps(plan.config, indent=4) + "\n", encoding="utf-8")
        line = plan.command.line(plan.builder.program, source, directory)
        _run(plan, line, directory, listen)
        _carry(plan.source, directory)
        (directory / BUILD_FILE).write_text(
            json.dumps(_record(plan, line), indent=2) + "\n", encoding="utf-8"
        )
        files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    engine = read_engine(plan.output_dir)
    return Built(engine, files, plan.log, time.monotonic() - started)


def _run(plan: BuildPlan, line: tuple[str, ...], directory: Path, listen: Listener | None) -> None:
    try:
        plan.log.write_text(f"{shlex.join(line)}\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {plan.log}: {error.strerror}") from error
    try:
        exit_code, lines = run(line, plan.log, listen)
    except OSError as error:
        if error.filename != line[0]:
            raise
        raise EngineError(f"{line[0]} cannot be started: {error.strerror}") from error
    if exit_code == 0:
        try:
            read_engine(directory)
        except SourceError as error:
            raise EngineError(
                f"{PROGRAM} ended well, but wrote no complete engine: {error.message}",
                hint=f"its output is in {plan.log}.",
            ) from error
        return
    ended = f"with {exit_code}" if exit_code > 0 else f"by signal {-exit_code}"
    shown = "\n".join(f"  {text}" for text in last_lines(lines))
    failure = known_failure(lines, exit_code)
    advice = f"{failure.name}: {failure.advice}\n  " if failure else ""
    raise EngineError(
        f"{PROGRAM} of TensorRT-LLM {plan.version} ended {ended}; no engine was written"
        + (f"\n{shown}" if shown else ""),
        hint=f"{advice}its whole output is in {plan.log}.",
    )


def _carry(source: Path, directory: Path) -> None:
    """Tokenizer files, so that the engine can be run on its own."""
    for file in sorted(file for name in CARRIED for file in source.glob(name) if file.is_file()):
        try:
            shutil.copyfile(file, directory / file.name)
        except OSError as error:
            if error.filename != str(file):
                raise
            raise SourceError(f"{file}: cannot be read ({error.strerror})") from error


def _record(plan: BuildPlan, line: tuple[str, ...]) -> dict[str, Any]:
    return {
        "producer": {"name": "phireg", "version": metadata.version("phireg")},
        "trtllm_version": plan.version,
        "source": str(plan.source),
        "weights": plan.weights,
        "options": asdict(plan.options),
        "command": list(line),
        "notes": list(plan.command.notes),
        "run_options": dict(plan.command.run_options),
    }
