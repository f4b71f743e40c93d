"""Choose who builds an engine: TensorRT-LLM, TensorRT or TensorRT for RTX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phireg.errors import EngineError, UsageError, check_known
from phireg.planning.plan import plan_config
from phireg.registry import AUTO
from phireg.tensorrt.build import BuiltEngine, build_engine
from phireg.tensorrt.package import INSTALL, NAMES, Backend, installed, load_package
from phireg.tensorrt.plan import EnginePlan, here, plan_engine
from phireg.trtllm import build as trtllm_build
from phireg.trtllm.build import BuildPlan, Built
from phireg.trtllm.command import BuildOptions
from phireg.trtllm.releases import INSTALL as INSTALL_TRTLLM

TENSORRT_LLM = "tensorrt-llm"
BUILDERS = (AUTO, TENSORRT_LLM, *NAMES)


def plan_build(
    source_dir: str | Path,
    output_dir: str | Path,
    options: BuildOptions | None = None,
    *,
    backend: str = AUTO,
    dummy_weights: bool = False,
    family: str = AUTO,
    dtype: str = "auto",
    version: str | None = None,
) -> BuildPlan | EnginePlan:
    """Check a checkpoint and decide who builds an engine of it, and how.

    Args:
        source_dir: the checkpoint.
        output_dir: where the engine will go.
        options: what is asked for.
        backend: "tensorrt-llm", "tensorrt", "tensorrt-rtx", or "auto": the TensorRT-LLM that is
            installed and reads this checkpoint, else TensorRT if there is a GPU here, else
            TensorRT for RTX.
        dummy_weights: plan an engine without weights: ``source_dir`` is then a model's directory,
            of which config.json is read, and ``options.tp_size`` the number of ranks.
        family: for ``dummy_weights``, as for :func:`phireg.plan`.
        dtype: for ``dummy_weights``, as for :func:`phireg.plan`.
        version: the TensorRT-LLM release to plan for; None is the installed one.

    Returns:
        a BuildPlan for TensorRT-LLM, an EnginePlan for the others.

    Raises:
        SourceError: the directory is not a checkpoint.
        CheckError: the reader would reject it, or read it wrongly.
        PlanError: the model's config has errors.
        UsageError: the options contradict each other or the checkpoint.
        EngineError: no builder is installed, or it cannot build this engine.
    """
    options = options or BuildOptions()
    check_known("backend", backend, BUILDERS)
    if version is not None and backend not in (AUTO, TENSORRT_LLM):
        raise UsageError(
            f"a release of TensorRT-LLM says nothing about {backend}",
            hint="leave out --trtllm-version, or take --backend tensorrt-llm.",
        )
    source = Path(source_dir)
    if dummy_weights:
        tp_size = options.tp_size or 1
        config = plan_config(source, family=family, dtype=dtype, tp_size=tp_size).config
        origin = trtllm_build.Origin(source, config, None)
    else:
        origin = trtllm_build.checkpoint_origin(source)
    if backend == TENSORRT_LLM or version is not None:
        return trtllm_build.plan_build(origin, output_dir, options, version)
    if backend in NAMES:
        return plan_engine(backend, origin, output_dir, options)
    reasons = []
    if options.gpus or options.weights == "separate":
        reasons.append("TensorRT-LLM has no such options")
    else:
        try:
            return trtllm_build.plan_build(origin, output_dir, options, None)
        except EngineError as error:
            reasons.append(error.message)
    candidates: list[Backend] = [name for name in NAMES if name in installed()]
    if "tensorrt-rtx" in candidates and not here():
        candidates = ["tensorrt-rtx"]  # the other needs a GPU
    for name in candidates:
        try:
            load_package(name)
        except EngineError as error:  # another CUDA's, or too old
            reasons.append(error.message)
        else:
            note = f"{NAMES[name]} builds it: {'; '.join(reasons)}"
            return plan_engine(name, origin, output_dir, options, [note])
    raise EngineError(
        f"nothing here builds this engine: {'; '.join(reasons)}"
        + ("" if candidates else "; TensorRT and TensorRT for RTX are not installed"),
        hint=f"{INSTALL['tensorrt-rtx']} builds without a GPU, for RTX cards; "
        f"{INSTALL['tensorrt']} is for data-center GPUs; {INSTALL_TRTLLM}",
    )


def build(
    plan: BuildPlan | EnginePlan, *, overwrite: bool = False, listen: Any = None
) -> Built | BuiltEngine:
    """Carry out a plan. The engine appears under its name complete, or not at all.

    Whatever ends this early, a signal included, ends the builder and its workers too.

    Args:
        plan: for an installed builder.
        overwrite: replace an existing engine once the new one is complete.
        listen: called with each line of TensorRT-LLM's output; of the others, with a mapping of
            rank, phase and, within a phase, the steps done and their number.

    Raises:
        EngineError: the build failed.
        OutputError: the output exists, or cannot be written.
        SourceError: a tokenizer file of the source cannot be read.
    """
    if isinstance(plan, BuildPlan):
        return trtllm_build.build(plan, overwrite=overwrite, listen=listen)
    return build_engine(plan, overwrite=overwrite, progress=listen)
