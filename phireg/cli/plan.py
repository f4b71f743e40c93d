"""``phireg plan``: what a conversion would do, from config.json and file headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli import engines
from phireg.cli.errors import findings_text
from phireg.cli.help import documented
from phireg.cli.options import json_option, model_dir_option, planning_options
from phireg.cli.output import bounded, columns, counted, emit, emit_json, memory
from phireg.errors import PlanError
from phireg.files.sizes import size

if TYPE_CHECKING:
    from phireg.planning.model import Plan


@documented(
    "phireg plan --model-dir ./Phi-3-medium-4k-instruct --tp-size 4",
    "phireg plan --model-dir ./phi-2 --qformat fp8 --json",
    waits="reading the model",
)
@model_dir_option(required=True)
@planning_options
@json_option
def command(model_dir: str, as_json: bool, **options: Any) -> None:
    """Show what convert or quantize would do, and what would stop it.

    Reads config.json and file headers only, and writes nothing. Ends with 3 if the plan has errors.
    """
    from phireg.conversion.stream import workers_of
    from phireg.planning.report import as_json as plan_json

    plan = phireg.plan(model_dir, **options)
    if as_json:
        family = plan.chosen.family
        document = provider_document(plan)
        document["provided_by"]["api"] = family.api
        outlook = None if plan.errors else engines.outlook(plan.config)
        document |= {**plan_json(plan, workers=workers_of(plan)), "engine": outlook}
        emit_json(bounded(document) | {"outputs": document["outputs"]})
    else:
        rows = [
            ("answer", _answer(plan)),
            ("family", f"{family_text(plan)}, plugin API {plan.chosen.family.api}"),
        ]
        rows += _source_rows(plan) if plan.errors else _work_rows(plan, workers_of(plan))
        parts = columns(rows), warnings_text(plan), findings_text(plan.findings)
        emit("\n".join(filter(None, parts)))
    if plan.errors:
        raise click.exceptions.Exit(PlanError.exit_code)


def _answer(plan: Plan) -> str:
    """Say whether it can be done, and over which numbers of ranks."""
    if plan.errors:
        found = f"no: {counted(len(plan.errors), 'problem')}, listed below"
        return found if plan.advice is None else f"{plan.advice}; {plan.options.tp_size} does not"
    command = "quantize" if plan.options.qformat else "convert"
    sizes = ", ".join(map(str, plan.tp_sizes))
    return f"yes, phireg {command} can do this; tp sizes that work: {sizes}"


def provider_document(plan: Plan) -> dict[str, Any]:
    """Return the source and the provider of its family, as ``--json`` has them."""
    candidate = plan.chosen.candidate
    return {
        "model_dir": plan.model_dir,
        "family": plan.family,
        "provided_by": {"distribution": candidate.distribution, "version": candidate.version},
        "plugin_warnings": list(plan.chosen.warnings),
    }


def family_text(plan: Plan) -> str:
    """``phi3-mini (phireg 0.1.0)``."""
    candidate = plan.chosen.candidate
    return f"{candidate.name} ({candidate.distribution} {candidate.version})"


def warnings_text(plan: Plan) -> str:
    """List the warnings of the choice of the family."""
    return "\n".join(f"warning  {warning}" for warning in plan.chosen.warnings)


def values_text(plan: Plan) -> str:
    """The dtype or format, and the change of values."""
    cast = f"{counted(plan.casts, 'tensor')} cast" if plan.casts else "no value changes"
    if plan.options.qformat is None:
        return f"{plan.options.dtype}, {cast}"
    if not plan.linears:
        return f"{format_text(plan)}; {cast}"
    return format_text(plan) + (f"; {cast} to {plan.options.dtype} first" if plan.casts else "")


def format_text(plan: Plan) -> str:
    """``FP8, 128 linears, the rest bfloat16; FP8 KV cache``."""
    layout, cache = plan.target.layouts[plan.options.qformat or ""], plan.options.kv_cache_dtype
    if layout.weight is None:
        linears = f"{plan.options.dtype} weights, which TensorRT-LLM's builder quantizes"
    else:
        linears = f"{counted(len(plan.linears), 'linear')}, the rest {plan.options.dtype}"
    text = f"{layout.algorithm}, {linears}"
    return f"{text}; {cache.upper()} KV cache" if cache else text


def _source_rows(plan: Plan) -> list[tuple[str, str]]:
    total = sum(tensor.nbytes for tensor in plan.source.tensors.values())
    files, tensors = len(plan.source.files), len(plan.source.tensors)
    return [("source", f"{size(total)} in {counted(files, 'file')}, {counted(tensors, 'tensor')}")]


def _work_rows(plan: Plan, workers: int) -> list[tuple[str, str]]:
    used = plan.sources
    once = sum(plan.source.tensors[name].nbytes for name in used)
    again = f"{size(plan.bytes_in - once)} of it twice" if plan.bytes_in > once else "each once"
    ranks, outlook = plan.options.tp_size, engines.outlook(plan.config)
    per_rank = len(plan.outputs) // ranks
    dropped = len(plan.source.tensors) - len(used)
    files = counted(len({plan.source.tensors[name].file for name in used}), "file")
    tensors = counted(len(used), "tensor")
    return [
        ("reads", f"{size(plan.bytes_in)} in {files}, {tensors}, {again}{_pass_text(plan)}"),
        (
            "writes",
            f"{ranks} x {size(max(plan.file_sizes))}, {ranks} x {counted(per_rank, 'tensor')}, "
            f"{values_text(plan)}",
        ),
        *_scale_rows(plan),
        *([("engine", engines.outlook_text(outlook, ranks))] if outlook else []),
        (
            "peak",
            f"{memory(plan.buffer_bytes(workers))} of buffers, {counted(workers, 'worker')}, "
            + ("two passes" if plan.linears else "one pass")
            + (", besides calibration" if plan.options.calibrated else ""),
        ),
        (
            "checks",
            f"{len(used)}/{len(plan.source.tensors)} source tensors mapped"
            + (f", {dropped} dropped with a reason" if dropped else "")
            + f", {len(plan.outputs)}/{len(plan.outputs)} targets filled, partition exact"
            + (f", every part divides over {ranks} ranks" if ranks > 1 else ""),
        ),
    ]


def _pass_text(plan: Plan) -> str:
    from phireg.conversion.scales import bytes_read

    if not plan.linears:
        return ""
    twice = " (twice with --alpha below 1)" if plan.smoothed else ""
    return f" to be written, and {size(bytes_read(plan))} before that for the scales{twice}"


def _scale_rows(plan: Plan) -> list[tuple[str, str]]:
    """A row for each kind of scale, and the needs of the calibration."""
    from phireg.reader.schemes import KV_SCALE

    if not plan.scales:
        return []
    kinds = {name.rpartition(".")[2]: scale.computed_from for name, scale in plan.scales.items()}
    texts = []
    for companion, basis in kinds.items():
        count = len(plan.kv_caches) if companion == KV_SCALE else len(plan.linears)
        owner = "attention module" if companion == KV_SCALE else "linear"
        origin = " and ".join(
            {"calibration": "calibration", "weights": "the weights"}[part.value] for part in basis
        )
        texts.append(f"{companion} of {counted(count, owner)}, from {origin}")
    labels = ["scales", *[""] * (len(texts) - 1)]
    how = "calibration: quantize does it, or takes statistics of an earlier one (--calib-stats)"
    needs = [("needs", how)] if plan.options.calibrated else []
    return [*zip(labels, texts, strict=True), *needs]
