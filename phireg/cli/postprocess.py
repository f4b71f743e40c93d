"""``phireg postprocess``: put the rows of an exporter's checkpoint into the reader's order."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli import options
from phireg.cli.errors import interruptible
from phireg.cli.help import CHECKPOINT, OUTPUT, documented
from phireg.cli.output import ProgressBars, columns, counted, emit, emit_json
from phireg.errors import CheckError, UsageError
from phireg.files.sizes import size

if TYPE_CHECKING:
    from phireg.postprocessing.postprocess import Postprocessed, RowOrder


@documented(
    "phireg postprocess ckpt --model-dir ./Phi-3-small-8k-instruct",
    "phireg postprocess ckpt --check",
    page="postprocess.md",
    waits="reading the checkpoint",
)
@options.checkpoint_argument("checkpoint_dir", "CKPT")
@options.model_dir_option("The model it was made from: its rows tell the order for certain.")
@options.family_option
@options.revision_option
@OUTPUT.option("--check", is_flag=True, help="Only tell; ends with 4 if there is something to do.")
@CHECKPOINT.option(
    "--in-source-order",
    is_flag=True,
    help="State that the rows are in the source's order, where nothing else tells.",
)
@OUTPUT.option(
    "--output-dir",
    type=options.Directory(),
    help="Write a new checkpoint.  [default: CKPT is replaced once the new one is complete]",
)
@OUTPUT.option("--overwrite", is_flag=True, help="Replace a checkpoint that --output-dir names.")
@options.quiet_option()
@options.json_option
def command(
    checkpoint_dir: str,
    *,
    check: bool,
    in_source_order: bool,
    output_dir: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Put the rows of a checkpoint right that an exporter left in the model's order.

    For Phi-3-small as quantized by TensorRT-LLM 0.11's development versions, whose query, key and
    value rows stayed grouped by KV head. A checkpoint that is right is left as it is.
    """
    if check and (in_source_order or output_dir is not None or overwrite):
        raise UsageError(
            "--check writes nothing and takes no statement",
            hint="leave out --in-source-order, --output-dir and --overwrite.",
        )
    if overwrite and output_dir is None:
        raise UsageError(
            "--overwrite is of --output-dir, which is not given",
            hint="leave it out: without --output-dir CKPT itself is replaced.",
        )
    if check:
        rows = phireg.row_order(checkpoint_dir, **options)
        if as_json:
            emit_json({"checkpoint_dir": checkpoint_dir, **asdict(rows)})
        elif not quiet:
            emit(_verdict(checkpoint_dir, rows))
        if rows.needed:
            raise click.exceptions.Exit(CheckError.exit_code)
        return
    started = time.monotonic()
    with interruptible(output_dir or checkpoint_dir), ProgressBars(quiet) as bars:
        result = phireg.postprocess(
            checkpoint_dir,
            output_dir,
            in_source_order=in_source_order,
            overwrite=overwrite,
            progress=bars.bytes("post-processing", "flushing to disk"),
            **options,
        )
    seconds = time.monotonic() - started
    if as_json:
        document = {
            "checkpoint_dir": checkpoint_dir,
            "output_dir": result.output_dir,
            **asdict(result.rows),
            "tensors": result.tensors,
            "files": dict(result.files),
            "seconds": round(seconds, 3),
        }
        emit_json(document)
    elif not quiet:
        needed = result.rows.needed
        emit(_text(result, seconds) if needed else _verdict(checkpoint_dir, result.rows))


def _verdict(checkpoint_dir: str, rows: RowOrder) -> str:
    verdict = "needs post-processing" if rows.needed else "needs no post-processing"
    return columns([("check", f"{checkpoint_dir} {verdict}"), *_evidence(rows)])


def _evidence(rows: RowOrder) -> list[tuple[str, str]]:
    labels = ["because", *[""] * len(rows.evidence)]
    return list(zip(labels, rows.evidence, strict=False))


def _text(result: Postprocessed, seconds: float) -> str:
    written = sum(result.files.values())
    linears = counted(result.rows.linears, "linear")
    lines = [
        ("family", result.rows.family),
        ("rows", f"were in {result.rows.order}"),
        *_evidence(result.rows),
        ("wrote", f"{size(written)} to {result.output_dir}"),
        ("changed", f"{counted(result.tensors, 'tensor')} of {linears}"),
        ("time", f"{seconds:.1f} s, {size(int(written / max(seconds, 1e-9)))}/s"),
    ]
    return columns(lines)
