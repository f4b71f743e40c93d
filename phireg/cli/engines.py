"""Text and JSON of engines that phireg builds itself: plans, builds, and what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from phireg.cli.output import ProgressBars, columns, counted, size

if TYPE_CHECKING:
    from phireg.tensorrt.build import BuiltEngine
    from phireg.tensorrt.engine import Limits
    from phireg.tensorrt.plan import EnginePlan
    from phireg.tensorrt.requirements import Estimate


def plan_document(plan: EnginePlan, built: BuiltEngine | None) -> dict[str, Any]:
    """Return a plan, and what was built of it, as ``--json`` has it."""
    return {
        "backend": plan.backend,
        "version": plan.package.version,
        "checkpoint_dir": str(plan.source) if plan.checkpoint else None,
        "model_dir": None if plan.checkpoint else str(plan.source),
        "config": dict(plan.config),
        "output_dir": str(plan.output_dir),
        "gpus": list(plan.gpus),
        "weights": plan.weights,
        "limits": asdict(plan.limits),
        "tp_size": plan.spec.tp_size,
        "notes": list(plan.notes),
        "estimate": asdict(plan.estimate),
        "ranks": [dict(record) for record in built.ranks] if built else None,
        "files": dict(built.files) if built else None,
        "log": str(built.log) if built else None,
        "seconds": round(built.seconds, 3) if built else None,
    }


def plan_text(plan: EnginePlan) -> str:
    """Show what would be built, and what that takes."""
    rows = [
        *_rows(plan),
        ("takes", estimate_text(plan.estimate, plan.spec.tp_size)),
        ("running", f"{size(plan.estimate.cache_bytes)} of caches a rank for the largest batch"),
    ]
    return columns(rows)


def estimate_text(estimate: Estimate, ranks: int) -> str:
    """Say what a build is estimated to take: its memory, time and size."""
    each = " a rank" if ranks > 1 else ""
    return (
        f"about {size(estimate.memory_bytes)} of memory besides mapped files, "
        f"{estimate.cpu_seconds:,.0f} s of CPU, {size(estimate.engine_bytes)} on disk{each}"
    )


def built_text(plan: EnginePlan, built: BuiltEngine) -> str:
    """Show an engine that was built, and what it took."""
    cpu = sum(record["cpu_seconds"] for record in built.ranks)
    peak = max(record["peak_memory_bytes"] for record in built.ranks)
    engines = sum(record["bytes"] for record in built.ranks)
    rows = [
        *_rows(plan),
        ("files", f"{counted(plan.spec.tp_size, 'rank')}, {size(engines)}"),
        ("log", str(built.log)),
        ("time", f"{built.seconds:.1f} s, {cpu:.1f} s of CPU"),
        ("memory", f"{size(peak)} at most, mapped files included"),
    ]
    return columns(rows)


def limits_text(limits: Limits) -> str:
    """``batches of 8, prompts of 1024 tokens, 2048 with their continuation``."""
    return (
        f"batches of {limits.max_batch_size}, prompts of {limits.max_input_len} tokens in steps of "
        f"{limits.max_chunk_len}, {limits.max_seq_len} with their continuation"
    )


@contextmanager
def build_progress(ranks: int, *, quiet: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the builder's phases on a terminal."""
    with ProgressBars(quiet) as bars:
        bars.spinner("starting the builder")

        def show(progress: Mapping[str, Any]) -> None:
            rank = f"rank {progress['rank'] + 1} of {ranks}: " if ranks > 1 else ""
            step = f", {progress['done']} of {progress['of']}" if "of" in progress else ""
            bars.spinner(f"{rank}{progress['phase'].lower()}{step}")

        yield show


def _rows(plan: EnginePlan) -> list[tuple[str, str]]:
    spec = plan.spec
    weights = "in the engine" if plan.weights == "embedded" else "inputs, fed when it runs"
    return [
        ("engine", str(plan.output_dir)),
        ("builder", plan.package.name),
        ("model", f"{spec.architecture.name}, {spec.dtype}"),
        ("GPUs", ", ".join(plan.gpus)),
        ("weights", weights),
        ("up to", limits_text(plan.limits)),
    ]
