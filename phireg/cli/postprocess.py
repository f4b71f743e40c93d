"""``phireg postprocess``: the rows of an exporter's checkpoint in the order the reader wants."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli.errors import interruptible
from phireg.cli.options import Directory, FamilyName, json_option
from phireg.cli.output import ProgressBars, columns, counted, emit, emit_json, size
from phireg.errors import CheckError, UsageError

if TYPE_CHECKING:
    from phireg.postprocessing.postprocess import Postprocessed, RowOrder


@click.command()
@click.argument("checkpoint_dir", type=Directory(), metavar="CKPT")
@click.option(
    "--model-dir",
    type=Directory(),
    metavar="DIR|REPO",
    help="The model it was made from: its rows tell the order for certain.",
)
@click.option(
    "--family",
    type=FamilyName(),
    default="auto",
    show_default=True,
    help="Family, or DISTRIBUTION:FAMILY; auto decides by the architecture.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of --model-dir on the hub.")
@click.option("--check", is_flag=True, help="Only tell; ends with 4 if there is something to do.")
@click.option(
    "--in-source-order",
    is_flag=True,
    help="State that the rows are in the source's order, where nothing else tells.",
)
@click.option(
    "--output-dir",
    type=Directory(),
    metavar="DIR",
    help="Write a new checkpoint.  [default: CKPT is replaced once the new one is complete]",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that --output-dir names.")
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
@json_option
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
    value rows stayed grouped by KV head. It is done once: a checkpoint that is right is refused.
    """
    if check:
        if in_source_order or output_dir is not None or overwrite:
            raise UsageError(
                "--check writes nothing and takes nobody's word",
                hint="leave out --in-source-order, --output-dir and --overwrite.",
            )
        _check(checkpoint_dir, quiet, as_json, options)
        return
    if overwrite and output_dir is None:
        raise UsageError(
            "--overwrite is of --output-dir, which is not given",
            hint="leave it out: without --output-dir CKPT itself is replaced.",
        )
    with interruptible(output_dir or checkpoint_dir):
        _postprocess(
            checkpoint_dir, output_dir, in_source_order, overwrite, quiet, as_json, options
        )


def _check(place: str, quiet: bool, as_json: bool, options: dict[str, Any]) -> None:

    found = phireg.row_order(place, **options)
    if as_json:
        emit_json({"checkpoint_dir": place, **_rows(found)})
    elif not quiet:
        verdict = "needs post-processing" if found.needed else "needs no post-processing"
        emit(columns([("check", f"{place} {verdict}"), *_evidence(found)]))
    if found.needed:
        raise click.exceptions.Exit(CheckError.exit_code)


def _postprocess(
    place: str,
    output_dir: str | None,
    in_source_order: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:

    started = time.monotonic()
    total = phireg.postprocess_bytes(place)
    with ProgressBars(quiet) as bars:
        advance = bars.bytes("post-processing", "flushing to disk")
        made = phireg.postprocess(
            place,
            output_dir,
            in_source_order=in_source_order,
            overwrite=overwrite,
            progress=lambda more: advance(more, total),
            **options,
        )
    seconds = time.monotonic() - started
    if as_json:
        emit_json(_document(place, made, seconds))
    elif not quiet:
        emit(_text(made, seconds))


def _document(place: str, made: Postprocessed, seconds: float) -> dict[str, Any]:
    return {
        "checkpoint_dir": place,
        "output_dir": str(made.output_dir),
        **_rows(made.rows),
        "tensors": made.tensors,
        "files": dict(made.files),
        "seconds": round(seconds, 3),
    }


def _rows(found: RowOrder) -> dict[str, Any]:
    return {
        "family": found.family,
        "needed": found.needed,
        "order": found.order,
        "linears": found.linears,
        "evidence": list(found.evidence),
    }


def _evidence(found: RowOrder) -> list[tuple[str, str]]:
    labels = ["because", *[""] * len(found.evidence)]
    return list(zip(labels, found.evidence, strict=False))


def _text(made: Postprocessed, seconds: float) -> str:
    written = sum(made.files.values())
    rows = [
        ("family", made.rows.family),
        ("rows", f"were in {made.rows.order}"),
        *_evidence(made.rows),
        ("wrote", f"{size(written)} to {made.output_dir}"),
        ("changed", f"{counted(made.tensors, 'tensor')} of {counted(made.rows.linears, 'linear')}"),
        ("time", f"{seconds:.1f} s, {size(int(written / max(seconds, 1e-9)))}/s"),
    ]
    return columns(rows)
