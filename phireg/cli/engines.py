"""Text and JSON of engines that phireg builds itself: plans, builds, and what is in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from phireg.children import find_program
from phireg.cli.output import ProgressBars, columns, counted, problem_list
from phireg.files.sizes import size

if TYPE_CHECKING:
    from phireg.tensorrt.build import BuiltEngine
    from phireg.tensorrt.engine import Limits
    from phireg.tensorrt.inspection import EngineInspection
    from phireg.tensorrt.plan import EnginePlan
    from phireg.tensorrt.requirements import Estimate
    from phireg.trtllm.build import BuildPlan

_FORMS = {"embedded": "in the engine", "separate": "inputs, fed when it runs"}
_LAYER = re.compile(r"(?<=_)\d+$|(?<=layers\.)\d+")


def plan_document(plan: BuildPlan | EnginePlan, built: Any) -> dict[str, Any]:
    """Return a plan, and what was built of it, as ``--json`` has it."""
    from phireg.trtllm.build import BuildPlan

    if isinstance(plan, BuildPlan):
        own: dict[str, Any] = {
            "tp_size": plan.command.tp_size,
            "notes": list(plan.command.notes),
            "command": list(plan.line),
            "trtllm_version": plan.version,
            "run_options": dict(plan.command.run_options),
        }
    else:
        own = {
            "tp_size": plan.spec.tp_size,
            "notes": list(plan.notes),
            "backend": plan.backend,
            "version": plan.package.version,
            "gpus": list(plan.gpus),
            "weights": plan.weights,
            "limits": asdict(plan.limits),
            "estimate": asdict(plan.estimate),
            "ranks": [dict(record) for record in built.ranks] if built else None,
        }
    return {
        **own,
        "checkpoint_dir": str(plan.source) if plan.checkpoint else None,
        "model_dir": None if plan.checkpoint else str(plan.source),
        "config": dict(plan.config),
        "output_dir": str(plan.output_dir),
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


def outlook(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what an engine of a checkpoint would need; None if its config means nothing known."""
    from phireg.errors import CheckError
    from phireg.reader.spec import parse_spec
    from phireg.tensorrt import requirements

    try:
        spec = parse_spec(config)
    except CheckError:
        return None
    slots = min(spec.max_position_embeddings, requirements.DEFAULT_TOKENS)
    problems = list(requirements.size_problems(spec))
    return {
        "problems": problems,
        "required_capabilities": [
            {"what": what, "least": least}
            for what, least in requirements.required_capabilities(spec).items()
        ],
        **{
            form: None
            if [*problems, *requirements.form_problems(spec, form)]
            else asdict(requirements.estimate(spec, form, 1, slots))
            for form in get_args(requirements.WeightsForm)
        },
    }


def has_builder(config: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's format is one that a builder takes: TensorRT-LLM, if here."""
    needs = outlook(config)
    return bool(needs and not needs["problems"]) or find_program("trtllm-build") is not None


def outlook_text(outlook: Mapping[str, Any], ranks: int) -> str:
    """Say what an engine of a checkpoint would need."""
    from phireg.tensorrt.requirements import Estimate, shown

    if outlook["problems"]:
        return f"none without TensorRT-LLM: {'; '.join(outlook['problems'])}"
    gpus = " and ".join(
        f"{shown(need['least'])} for {need['what']}" for need in outlook["required_capabilities"]
    )
    text = f"without TensorRT-LLM{', on compute capability ' if gpus else ''}{gpus}: "
    text += estimate_text(Estimate(**outlook["embedded"]), ranks)
    if outlook["separate"] is None:
        return text
    return f"{text}; {size(outlook['separate']['memory_bytes'])} with --weights separate"


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


def inspected(directory: str, check: bool) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    """Inspect an engine; return what is wrong with it, its text and its JSON document."""
    from phireg.tensorrt.inspection import inspect_engine

    inspection = inspect_engine(directory, check=check)
    engine = inspection.engine
    document = {
        "engine_dir": directory,
        "backend": engine.backend,
        "version": engine.version,
        "gpus": list(engine.gpus),
        "weights": engine.weights,
        "limits": asdict(engine.limits),
        "config": dict(engine.config),
        "manifest": dict(inspection.manifest),
        "files": dict(inspection.sizes),
        "layers": inspection.layers,
        "unloaded": inspection.unloaded,
        "checked": check,
        "problems": list(inspection.problems),
    }
    return inspection.problems, _inspected_text(directory, inspection, check), document


def _inspected_text(directory: str, inspection: EngineInspection, check: bool) -> str:
    from phireg.tensorrt.package import NAMES

    engine, first = inspection.engine, inspection.engine.records()[0]
    if inspection.problems:
        verdict = f"{counted(len(inspection.problems), 'problem')}, listed at the end"
    elif check:
        verdict = "the engines are as they were written"
    else:
        verdict = "sizes are as they were written; --check compares the contents"
    verified, running = inspection.manifest.get("verified"), "never verified: phireg verify ENGINE"
    if isinstance(verified, dict):
        running = f"{verified.get('verdict')}: {verified.get('summary')}"
    rows = [
        ("engine", directory),
        ("check", verdict),
        ("built by", f"{NAMES[engine.backend]} {engine.version}"),
        ("built from", str(engine.checkpoint_dir or "a config.json alone")),
        ("model", f"{engine.spec.architecture.name}, {engine.spec.dtype}"),
        ("GPUs", ", ".join(engine.gpus)),
        ("weights", _FORMS[engine.weights]),
        ("up to", limits_text(engine.limits)),
        ("on a GPU", running),
        *(
            ("files" if not n else "", f"{name}  {size(count)}")
            for n, (name, count) in enumerate(inspection.sizes.items())
        ),
    ]
    parts = [columns(rows)]
    parts += [
        f"{name} of a rank\n" + columns(_tensors(first[name]), indent=2)
        for name in ("inputs", "outputs")
    ]
    layers = [(kind, f"x {count}") for kind, count in first["layers"].items()]
    parts.append("layers of the network\n" + columns(layers, indent=2))
    if inspection.layers is None:
        parts.append(f"layers of the engine: not shown; {inspection.unloaded}")
    else:
        kinds = Counter(
            str(layer.get("LayerType", layer.get("Name"))) if isinstance(layer, dict) else layer
            for layer in inspection.layers
        )
        rows = [(str(kind), f"x {count}") for kind, count in kinds.most_common()]
        parts.append("layers of the engine\n" + columns(rows, indent=2))
    parts += [problem_list(inspection.problems)] if inspection.problems else []
    return "\n".join(parts)


def _tensors(tensors: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """List tensors, once for those of all layers; -1 is a size that is chosen when it runs."""
    cells = ([str(tensor.get(key)) for key in ("name", "dtype", "shape")] for tensor in tensors)
    alike = Counter((_LAYER.sub("N", name), dtype, shape) for name, dtype, shape in cells)
    return [(*row, f"x {count}" if count > 1 else "") for row, count in alike.items()]


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
    return [
        ("engine", str(plan.output_dir)),
        ("builder", plan.package.name),
        ("model", f"{spec.architecture.name}, {spec.dtype}"),
        ("GPUs", ", ".join(plan.gpus)),
        ("weights", _FORMS[plan.weights]),
        ("up to", limits_text(plan.limits)),
    ]
