"""``phireg plan``: what a conversion would do, from config.json and file headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from phireg.cli.errors import findings_text
from phireg.cli.options import json_option, make_plan, model_dir_option, planning_options
from phireg.cli.output import columns, counted, emit, emit_json, memory, size
from phireg.cli.scales import format_text, pass_text, scale_rows
from phireg.errors import PlanError

if TYPE_CHECKING:
    from phireg.planning.model import Plan


@click.command()
@model_dir_option
@planning_options
@json_option
def command(model_dir: str, as_json: bool, **options: Any) -> None:
    """Show what convert or quantize would do, and what would stop it.

    Reads config.json and file headers only, and writes nothing. Ends with 3 if the plan has errors.
    """
    plan = make_plan(model_dir, **options)
    if as_json:
        emit_json(_document(plan))
    else:
        emit(_text(plan))
    if plan.errors:
        raise click.exceptions.Exit(PlanError.exit_code)


def _document(plan: Plan) -> dict[str, Any]:
    from phireg.conversion.stream import WORKERS
    from phireg.planning.report import as_json

    candidate = plan.chosen.candidate
    return {
        "model_dir": plan.model_dir,
        "provided_by": {
            "distribution": candidate.distribution,
            "version": candidate.version,
            "api": plan.chosen.family.api,
        },
        "plugin_warnings": list(plan.chosen.warnings),
        **as_json(plan, workers=WORKERS),
    }


def family_text(plan: Plan) -> str:
    """``phi3-mini (phireg 0.1.0)``."""
    candidate = plan.chosen.candidate
    return f"{candidate.name} ({candidate.distribution} {candidate.version})"


def warnings_text(plan: Plan) -> str:
    """What was noticed while the family was chosen."""
    return "\n".join(f"warning  {warning}" for warning in plan.chosen.warnings)


def _text(plan: Plan) -> str:
    rows = [("family", f"{family_text(plan)}, plugin API {plan.chosen.family.api}")]
    rows += _problem_rows(plan) if plan.errors else _rows(plan)
    parts = (
        columns(rows),
        warnings_text(plan),
        findings_text(plan.findings),
    )
    return "\n".join(filter(None, parts))


def _problem_rows(plan: Plan) -> list[tuple[str, str]]:
    total = sum(tensor.nbytes for tensor in plan.source.tensors.values())
    files, tensors = len(plan.source.files), len(plan.source.tensors)
    return [
        ("source", f"{size(total)} in {counted(files, 'file')}, {counted(tensors, 'tensor')}"),
        ("writes", "nothing, because of the errors below"),
    ]


def _rows(plan: Plan) -> list[tuple[str, str]]:
    from phireg.conversion.stream import WORKERS

    used = plan.sources
    once = sum(plan.source.tensors[name].nbytes for name in used)
    again = f"{size(plan.bytes_in - once)} of it twice" if plan.bytes_in > once else "each once"
    ranks = plan.options.tp_size
    per_rank = len(plan.outputs) // ranks
    dropped = len(plan.source.tensors) - len(used)
    files = counted(len({plan.source.tensors[name].file for name in used}), "file")
    tensors = counted(len(used), "tensor")
    return [
        ("reads", f"{size(plan.bytes_in)} in {files}, {tensors}, {again}{pass_text(plan)}"),
        (
            "writes",
            f"{ranks} x {size(max(plan.file_sizes))}, {ranks} x {counted(per_rank, 'tensor')}, "
            f"{values_text(plan)}",
        ),
        *scale_rows(plan),
        (
            "peak",
            f"{memory(plan.buffer_bytes(WORKERS))} of buffers, {counted(WORKERS, 'worker')}, "
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


def values_text(plan: Plan) -> str:
    """The dtype or format, and what happens to the values on the way."""
    cast = f"{counted(plan.casts, 'tensor')} cast"
    if plan.options.scheme is None:
        return f"{plan.options.dtype}, {cast if plan.casts else 'no value changes'}"
    if plan.linears:
        first = f"; {cast} to {plan.options.dtype} first" if plan.casts else ""
    else:
        first = f"; {cast if plan.casts else 'no value changes'}"
    return format_text(plan) + first
