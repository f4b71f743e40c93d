"""Plan a native engine: the package, the GPUs, the limits, and every reason not to begin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phireg.children import query_gpus
from phireg.errors import EngineError, UsageError
from phireg.reader.spec import ModelSpec, parse_spec
from phireg.tensorrt.engine import Limits
from phireg.tensorrt.package import NAMES, Backend, Package, load_package
from phireg.tensorrt.requirements import (
    DEFAULT_TOKENS,
    Estimate,
    WeightsForm,
    capability_problems,
    estimate,
    form_problems,
    remarks,
    required_capabilities,
    shown,
    size_problems,
)
from phireg.trtllm.build import Origin
from phireg.trtllm.command import BuildOptions, check_lengths, check_ranks, check_stages

_DEFAULT_BATCH = 8
# Of one step: the mask of a dense layer takes chunk x capacity bytes per row, that of a
# block-sparse layer as many per head.
_CHUNK, _SPARSE_CHUNK = 512, 256
_MOST_TOKENS = 2**31 - 1  # of a step: ``last_tokens`` is int32

_TRTLLM_ONLY = (
    "gemm_plugin", "gpt_attention_plugin", "context_fmha", "context_fmha_fp32_acc",
    "use_fp8_context_fmha",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What will be built, and what that takes."""

    source: Path  # the checkpoint; for an engine without weights, the model's directory
    config: Mapping[str, Any]  # the checkpoint's config.json
    spec: ModelSpec
    checkpoint: bool  # there is one
    output_dir: Path
    package: Package
    gpus: tuple[str, ...]  # "sm89"; empty: the GPU here
    weights: WeightsForm
    limits: Limits
    options: BuildOptions
    estimate: Estimate  # of one rank
    notes: tuple[str, ...]

    @property
    def backend(self) -> Backend:
        """The backend that builds."""
        return self.package.backend

    @property
    def log(self) -> Path:
        """Return the file of the builder's output, beside the engine."""
        return self.output_dir.with_name(f"{self.output_dir.name}.build.log")


def plan_engine(
    backend: Backend,
    origin: Origin,
    output_dir: str | Path,
    options: BuildOptions,
    notes: Sequence[str] = (),
) -> EnginePlan:
    """Decide everything about the engine; ``notes`` come before the plan's own."""
    spec = parse_spec(origin.config, str(origin.source / "config.json"))
    _check_options(options, spec)
    has_weights = origin.weight_bytes is not None
    form: WeightsForm = options.weights if has_weights else "separate"
    limits = _limits(spec, options)
    package = load_package(backend)
    gpus, gpu_notes = _gpus(package, spec, options.gpus)
    problems = [
        *capability_problems(spec, gpus),
        *size_problems(spec),
        *form_problems(spec, form),
        *_rank_problems(package, spec),
    ]
    if problems:
        raise EngineError(
            f"{package.name} cannot build this engine:"
            + "".join(f"\n  {problem}" for problem in problems),
            hint="docs/engines.md has the table of what builds.",
        )
    return EnginePlan(
        source=origin.source,
        config=origin.config,
        spec=spec,
        checkpoint=has_weights,
        output_dir=Path(output_dir),
        package=package,
        gpus=gpus,
        weights=form,
        limits=limits,
        options=options,
        estimate=estimate(spec, form, limits.max_batch_size, limits.max_seq_len),
        notes=(*notes, *_ignored(options), *gpu_notes, *remarks(spec, limits.max_seq_len)),
    )


def here() -> tuple[str, ...]:
    """Return the compute capabilities of this machine's GPUs, as NVIDIA's driver tells them."""
    capabilities = re.findall(r"^(\d+)\.(\d)\s*$", query_gpus("compute_cap")[1], re.MULTILINE)
    return tuple(dict.fromkeys(f"sm{major}{minor}" for major, minor in capabilities))


def driver_version() -> str:
    """Return the version of NVIDIA's driver; "" without one."""
    code, output = query_gpus("driver_version")
    return "" if code else output.partition("\n")[0].strip()


def parse_gpus(text: str) -> tuple[str, ...]:
    """Read a list of compute capabilities: sm89,sm120 or 8.9,12.0."""
    names = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", part.strip().lower())
        if match is None:
            raise UsageError(
                f"--gpu {text}: {part.strip()!r} is no compute capability",
                hint="for example sm89,sm120 (or 8.9,12.0).",
            )
        names.append(f"sm{match[1]}{match[2]}")
    return tuple(dict.fromkeys(names))


def _check_options(options: BuildOptions, spec: ModelSpec) -> None:
    """Refuse other numbers of ranks than the checkpoint's, and another builder's arguments."""
    if options.extra:
        raise UsageError(
            f"{options.extra[0]}: arguments after '--' are trtllm-build's",
            hint="leave them out, or add --backend tensorrt-llm.",
        )
    check_stages(options, 1)
    check_ranks(options, spec.tp_size)


def _limits(spec: ModelSpec, options: BuildOptions) -> Limits:
    positions, prompt = spec.max_position_embeddings, options.max_input_len or 0
    total = check_lengths(options, positions, 0) or min(positions, max(DEFAULT_TOKENS, 2 * prompt))
    check_lengths(replace(options, max_output_len=None, max_seq_len=total), positions, 1)
    prompt = prompt or total - 1
    chunk = min(_CHUNK if spec.sparse is None else _SPARSE_CHUNK, prompt)
    batch = options.max_batch_size or _DEFAULT_BATCH
    if batch * chunk > _MOST_TOKENS:
        raise UsageError(
            f"--max-batch-size {batch}: steps of {chunk} tokens are more than an engine can count",
            hint="lower --max-batch-size.",
        )
    return Limits(batch, prompt, total, chunk)


def _gpus(
    package: Package, spec: ModelSpec, chosen: Sequence[str]
) -> tuple[tuple[str, ...], list[str]]:
    """Return the GPUs to compile for, and remarks about the choice."""
    known, present = package.capabilities, here()
    if not known:  # the builder measures on the GPU
        if not present:
            raise EngineError(
                f"{package.name} builds for the GPU of the machine it runs on; there is none here",
                hint="build on that machine, or with --backend tensorrt-rtx, which needs none.",
            )
        if chosen and tuple(chosen) != present[:1]:
            raise UsageError(
                f"--gpu {','.join(chosen)}: {package.name} builds for the GPU here, {present[0]}",
                hint="leave out --gpu; --backend tensorrt-rtx compiles for other GPUs.",
            )
        return present[:1], []
    if unknown := [gpu for gpu in chosen if gpu not in known]:
        raise EngineError(
            f"{package.name} does not compile for {', '.join(unknown)}, only for "
            f"{', '.join(known)}",
            hint="for data-center GPUs such as sm90 and sm100 take --backend tensorrt, on a "
            "machine with such a GPU.",
        )
    if chosen:
        return tuple(chosen), []
    least = max(required_capabilities(spec).values(), default=0)
    able = tuple(gpu for gpu in known if int(gpu[2:]) >= least)
    usable = tuple(gpu for gpu in present if gpu in known)
    if usable:
        return usable, [f"it is compiled for the GPU here ({', '.join(usable)}); see --gpu"]
    notes = []
    if present:
        notes.append(f"{package.name} cannot run on the GPU here ({', '.join(present)})")
    if able != known:
        notes.append(f"it is compiled for compute capability {shown(least)} and more; see --gpu")
    return able, notes


def _rank_problems(package: Package, spec: ModelSpec) -> Iterator[str]:
    definition = package.trt.INetworkDefinition
    if spec.tp_size > 1 and not hasattr(definition, "add_dist_collective"):
        yield (
            f"the checkpoint has {spec.tp_size} ranks, and this version has no layer that sums "
            "over them; convert with --tp-size 1, or install a newer version"
        )


def _ignored(options: BuildOptions) -> Iterator[str]:
    for name in _TRTLLM_ONLY:
        value = getattr(options, name)
        if value is not None:
            yield (
                f"--{name.replace('_', '-')} is for TensorRT-LLM's plugins, which "
                f"{' and '.join(NAMES.values())} do not have; it changes nothing"
            )
