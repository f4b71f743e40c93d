"""``phireg convert``: from a Hugging Face model to a TensorRT-LLM checkpoint."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli.errors import findings_text, interruptible
from phireg.cli.options import (
    allow_overflow_option,
    conversion_options,
    json_option,
    make_plan,
    model_dir_option,
    output_dir_option,
    overwrite_option,
    quiet_option,
)
from phireg.cli.output import ProgressBars, columns, counted, emit, emit_json, size
from phireg.cli.plan import family_text, values_text, warnings_text

if TYPE_CHECKING:
    from phireg.conversion.convert import Converted
    from phireg.findings import Finding
    from phireg.planning.model import Plan


@click.command()
@model_dir_option
@output_dir_option("checkpoint")
@conversion_options
@overwrite_option("checkpoint")
@allow_overflow_option
@quiet_option()
@json_option
def command(output_dir: str, **options: Any) -> None:
    """Convert a model to a TensorRT-LLM checkpoint.

    Everything that can be checked is checked before the first byte is written (see phireg plan).
    """
    with interruptible(output_dir):
        _convert(output_dir, **options)


def _convert(
    output_dir: str,
    *,
    model_dir: str,
    overwrite: bool,
    allow_overflow: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    started = time.monotonic()
    plan = make_plan(model_dir, **options)

    total = sum(output.nbytes for output in plan.outputs)
    with ProgressBars(quiet) as bars:
        advance = bars.bytes("converting", "flushing to disk")
        converted = phireg.convert(
            plan,
            output_dir,
            overwrite=overwrite,
            allow_overflow=allow_overflow,
            progress=lambda more: advance(more, total),
        )
    seconds = time.monotonic() - started
    if as_json:
        emit_json(_document(plan, converted, seconds))
    elif not quiet:
        emit(_text(plan, converted, seconds))


def _document(plan: Plan, converted: Converted, seconds: float) -> dict[str, Any]:
    from phireg.planning.report import findings_json

    candidate = plan.chosen.candidate
    return {
        "output_dir": str(converted.output_dir),
        "files": dict(converted.files),
        "model_dir": plan.model_dir,
        "revision": plan.source.revision,
        "family": plan.family,
        "provided_by": {"distribution": candidate.distribution, "version": candidate.version},
        "dtype": plan.options.dtype,
        "tp_size": plan.options.tp_size,
        "moe_ep_size": plan.options.ranks.moe_ep_size,
        "weight_only": plan.options.weight_only,
        "cast_tensors": plan.casts,
        "losses": {
            name: {"overflowed": loss.overflowed, "flushed": loss.flushed}
            for name, loss in sorted(converted.losses.items())
        },
        "plugin_warnings": list(plan.chosen.warnings),
        "findings": findings_json(plan.findings),
        "seconds": round(seconds, 3),
    }


def _text(plan: Plan, converted: Converted, seconds: float) -> str:
    ranks = plan.options.tp_size
    others = [name for name in converted.files if not name.endswith(".safetensors")]
    written = sum(converted.files.values())
    rows = [
        ("family", family_text(plan)),
        ("wrote", f"{size(written)} to {converted.output_dir}"),
        ("files", f"{counted(ranks, 'rank file')} of {size(max(plan.file_sizes))}"),
        ("", f"{', '.join(others)}"),
        ("values", values_text(plan)),
        ("time", f"{seconds:.1f} s, {size(int(written / max(seconds, 1e-9)))}/s"),
    ]
    findings = (*loss_findings(converted), *plan.findings)
    return "\n".join(filter(None, (columns(rows), warnings_text(plan), findings_text(findings))))


def loss_findings(converted: Converted) -> list[Finding]:
    """One warning for each kind of loss; --json has the tensors."""
    from phireg.findings import Finding, Severity

    found = []
    for code, what in (("overflowed", "became infinite"), ("flushed", "became zero")):
        counts = {
            name: count for name, loss in converted.losses.items() if (count := getattr(loss, code))
        }
        if counts:
            most = max(counts, key=counts.__getitem__)
            detail = (
                f"{counted(sum(counts.values()), 'value')} in {counted(len(counts), 'tensor')} "
                f"{what} in the cast, most in {most} ({counts[most]:,})"
            )
            found.append(Finding(Severity.WARNING, code, "", detail))
    return found
