"""The models of a summarization: which backend runs which directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phireg.checkpoint.shards import is_executed
from phireg.errors import UsageError
from phireg.files.kinds import CHECKPOINT, ENGINE, check_kind
from phireg.generation.backend import (
    DEFAULTS,
    EXECUTOR,
    HF,
    TENSORRT,
    TENSORRT_LLM,
    Description,
    Options,
    check_directory,
    describe,
    engine_backend,
    opener,
)
from phireg.generation.processes import check_processes

ENGINE_BACKEND = "engine"
"""In a list of backends: the one that runs the engine."""

_HINTS = {
    EXECUTOR: "give the checkpoint as the argument.",
    TENSORRT: "give --engine-dir the engine; phireg build makes one of a checkpoint.",
    TENSORRT_LLM: "give --engine-dir the engine; phireg build makes one of a checkpoint.",
    HF: "give --model-dir the source model.",
}


@dataclass(frozen=True, slots=True)
class ModelRun:
    """A model and the backend that runs it."""

    backend: str
    directory: Path  # the checkpoint, engine or source model
    options: Options = DEFAULTS

    @property
    def description(self) -> Description:
        """The model's limits."""
        return describe(self.backend, self.directory, self.options)


def choose_models(
    directories: Sequence[Path],
    hf_model_dir: Path | None,
    backends: Sequence[str],
    options: Options,
    *,
    hf_dtype: str | None = None,
    also_hf: bool = False,
) -> tuple[ModelRun, ...]:
    """Give each backend, by default the one that runs the directories, the directory that it runs.

    The directories are a checkpoint, an engine, or one of each. The options are of the executor;
    the others share its device, and an engine has its own dtype.
    """
    engine, checkpoint = _by_kind(directories)
    runtime = TENSORRT_LLM if engine is None else engine_backend(engine)
    names = [runtime if name == ENGINE_BACKEND else name for name in backends]
    names = names or [EXECUTOR if engine is None else runtime]
    names += [HF] if also_hf else []
    fixed = replace(options, dtype=None, offload=None)
    models = []
    for name in dict.fromkeys(names):
        opener(name)
        directory, own_options = {
            HF: (hf_model_dir, replace(fixed, dtype=hf_dtype)),
            TENSORRT_LLM: (engine, fixed),
            TENSORRT: (engine, fixed),
        }.get(name, (checkpoint, options))
        if directory is None:
            raise UsageError(
                f"there is nothing to run with backend '{name}'",
                hint=_HINTS.get(name, _HINTS[EXECUTOR]),
            )
        check_directory(name, directory)
        models.append(ModelRun(name, directory, own_options))
    return tuple(models)


def _by_kind(directories: Sequence[Path]) -> tuple[Path | None, Path | None]:
    """Return the engine and the checkpoint among the directories."""
    by_kind: dict[str, Path] = {}
    for directory in directories:
        runs = is_executed(directory)
        kind = CHECKPOINT if runs else check_kind(directory, CHECKPOINT, ENGINE)
        name = "engine" if kind is ENGINE else "checkpoint"
        if name in by_kind:
            raise UsageError(
                f"{by_kind[name]} and {directory} are both {name}s",
                hint="give one checkpoint and one engine at most.",
            )
        by_kind[name] = directory
    return by_kind.get("engine"), by_kind.get("checkpoint")


def check_model_processes(models: Sequence[ModelRun], tp: int | None = None) -> bool:
    """Refuse unusable numbers of processes; return whether ``tp`` are still to be started."""
    backends = [model.backend for model in models]
    if tp and EXECUTOR not in backends:
        raise UsageError("--tp-size is for the executor, which is not run", hint="leave it out.")
    start = False
    for model in models:
        processes = opener(model.backend).process_rank()[1]
        if tp and model.backend == EXECUTOR:
            start = tp > processes
            processes = max(tp, processes)
        if model.backend != HF or len(models) == 1:
            own_tp = tp if model.backend == EXECUTOR else None
            check_processes(model.backend, model.directory, model.description, processes, own_tp)
    return start


def serve_as_worker(models: Sequence[ModelRun]) -> None:
    """Run the requests of rank 0 with each model whose other rank this process is."""
    for model in models:
        if is_worker(model):
            opener(model.backend).run_worker(model.directory, model.options)


def is_worker(model: ModelRun) -> bool:
    """Tell if this process is another rank of a model than 0."""
    return model.backend != HF and opener(model.backend).process_rank()[0] > 0
