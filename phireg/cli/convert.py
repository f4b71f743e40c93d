"""``phireg convert``: from a Hugging Face model to a TensorRT-LLM checkpoint."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli import engines, options
from phireg.cli.errors import findings_text, interruptible
from phireg.cli.help import QUANTIZATION, documented
from phireg.cli.output import ProgressBars, columns, counted, emit, emit_json, next_steps
from phireg.cli.plan import family_text, provider_document, values_text, warnings_text
from phireg.errors import UsageError
from phireg.files.sizes import size

if TYPE_CHECKING:
    from pathlib import Path

    from phireg.conversion.convert import Converted
    from phireg.findings import Finding
    from phireg.planning.model import Plan


@documented(
    "phireg convert --model-dir microsoft/phi-2 --output-dir ckpt",
    "phireg convert --model-dir ./phi-3-mini --output-dir ckpt --tp-size 2",
    waits="reading the model",
)
@options.model_dir_option(required=True)
@options.output_dir_option("checkpoint")
@options.source_options
@options.form_option
@QUANTIZATION.option(
    "--use-weight-only", is_flag=True, help="phireg quantize --qformat int8_wo does it.", rare=True
)
@QUANTIZATION.option(
    "--weight-only-precision",
    type=click.Choice(("int8", "int4")),
    help="With --use-weight-only.  [default: int8]",
    rare=True,
)
@options.overwrite_option("checkpoint")
@options.allow_overflow_option
@options.quiet_option()
@options.json_option
def command(
    model_dir: str,
    output_dir: str,
    overwrite: bool,
    allow_overflow: bool,
    quiet: bool,
    as_json: bool,
    use_weight_only: bool,
    weight_only_precision: str | None,
    **options: Any,
) -> None:
    """Convert a model to a TensorRT-LLM checkpoint.

    Everything that can be checked is checked before the first byte is written (see phireg plan).
    """
    started = time.monotonic()
    if use_weight_only:
        options["qformat"] = f"{weight_only_precision or 'int8'}_wo"
    elif weight_only_precision:
        raise UsageError(
            f"--weight-only-precision {weight_only_precision} has no effect without "
            "--use-weight-only",
            hint=f"phireg quantize --qformat {weight_only_precision}_wo is what you may want.",
        )
    with interruptible(output_dir):
        plan = phireg.plan(model_dir, **options)
        with ProgressBars(quiet) as bars:
            converted = phireg.convert(
                plan,
                output_dir,
                overwrite=overwrite,
                allow_overflow=allow_overflow,
                progress=bars.bytes("converting", "flushing to disk"),
            )
        seconds = time.monotonic() - started
        if as_json:
            emit_json({**conversion_document(plan, converted), "seconds": round(seconds, 3)})
        elif not quiet:
            emit(_text(plan, converted, seconds))


def conversion_document(plan: Plan, converted: Converted) -> dict[str, Any]:
    """Return the common part of ``--json``; docs/command-line.md describes it."""
    from phireg.planning.report import findings_json

    return {
        **provider_document(plan),
        "revision": plan.source.revision,
        "output_dir": str(converted.output_dir),
        "files": dict(converted.files),
        **plan.options.as_json(),
        "cast_tensors": plan.casts,
        "losses": {
            name: dataclasses.asdict(loss) for name, loss in sorted(converted.losses.items())
        },
        "findings": findings_json((*converted.findings, *plan.findings)),
    }


def file_rows(plan: Plan, converted: Converted) -> list[tuple[str, str]]:
    """Rows of a summary on the files that were written."""
    others = [name for name in converted.files if not name.endswith(".safetensors")]
    noun = "rank file" if plan.target.by_rank else "file"
    rank_files = counted(len(plan.files), noun)
    return [
        ("wrote", f"{size(sum(converted.files.values()))} to {converted.output_dir}"),
        ("files", f"{rank_files} of {size(max(plan.file_sizes))}"),
        ("", f"{', '.join(others)}"),
    ]


def _text(plan: Plan, converted: Converted, seconds: float) -> str:
    rate = size(int(sum(converted.files.values()) / max(seconds, 1e-9)))
    rows = [
        ("family", family_text(plan)),
        *file_rows(plan, converted),
        ("values", values_text(plan)),
        ("time", f"{seconds:.1f} s, {rate}/s"),
    ]
    findings = findings_text((*loss_findings(converted), *plan.findings))
    following = steps_after(plan, converted)
    return "\n".join(filter(None, (columns(rows), warnings_text(plan), findings, following)))


def steps_after(plan: Plan, converted: Converted) -> str:
    """What to do with a new checkpoint."""
    checkpoint = str(converted.output_dir)
    model = ["--model-dir", plan.model_dir]
    if plan.source.revision is not None:
        model += ["--revision", plan.source.revision]
    build = ["phireg", "build", checkpoint, "--output-dir", f"{checkpoint}-engine"]
    return next_steps(
        ["phireg", "verify", checkpoint, *model],
        *run_after(converted.output_dir),
        *([build] if plan.target.by_rank and engines.has_builder(plan.config) else []),
    )


def run_after(directory: Path) -> list[list[str]]:
    """Return the command that runs a model, if it has the tokenizer that a prompt needs."""
    from phireg.generation.tokenizer import has_tokenizer

    run = ["phireg", "run", str(directory), "--prompt", "The capital of France is"]
    return [run] if has_tokenizer(directory) else []


def loss_findings(converted: Converted) -> list[Finding]:
    """Warnings about scales, and one for each kind of loss; --json has the tensors."""
    from phireg.findings import Finding, Severity

    findings = list(converted.findings)
    for code, change in (
        ("nan", "are NaN in the source"),
        ("infinite", "are infinite in the source"),
        ("overflowed", "became infinite in the cast"),
        ("flushed", "became zero in the cast"),
    ):
        counts = {
            name: count for name, loss in converted.losses.items() if (count := getattr(loss, code))
        }
        if counts:
            most = max(counts, key=counts.__getitem__)
            detail = (
                f"{counted(sum(counts.values()), 'value')} in {counted(len(counts), 'tensor')} "
                f"{change}, most in {most} ({counts[most]:,})"
            )
            findings.append(Finding(Severity.WARNING, code, "", detail))
    return findings
