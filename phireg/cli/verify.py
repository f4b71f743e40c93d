"""``phireg verify``: compare a checkpoint with its source, and locate what differs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli import options
from phireg.cli.help import MODEL, RUNNING, SERVER, documented
from phireg.cli.output import (
    ProgressBars,
    Styled,
    bounded,
    columns,
    emit,
    emit_json,
    page_facts,
    printable,
)
from phireg.errors import CheckError, IncompleteError, UsageError

if TYPE_CHECKING:
    from phireg.verification.result import Check, Verification

_MOST_PROBLEMS = 12
_SIZES = ("architecture", "hidden_size", "num_layers", "num_hidden_layers", "vocab_size")
"""Settings that tell another model; where they differ, the others need no lines."""


@documented(
    "phireg verify ckpt --model-dir ./phi-2",
    "phireg verify ckpt --model-dir ./phi-2 --quick",
    page="verify.md",
    waits="reading the checkpoint",
)
@options.checkpoint_argument("checkpoint_dir", "CKPT|ENGINE", required=False)
@options.model_dir_option(
    "The model that CKPT was made from; of an engine, perhaps the checkpoint."
)
@options.family_option
@options.revision_option
@options.reading_options
@RUNNING.option("--quick", is_flag=True, help="Stop before anything is computed.")
@options.device_option
@MODEL.option(
    "--dtype",
    type=options.Dtype(),
    default="float32",
    help="In which dtype to compute; float32 compares sharpest.",
)
@RUNNING.option(
    *("--max-input-len", "max_tokens"),
    aliases=("--max-tokens",),
    type=options.Whole(),
    help="Longest prompt.  [default: what crosses the model's thresholds, within a budget]",
)
@SERVER.option("--endpoint", metavar="URL", help="Verify a server that serves MODEL instead.")
@SERVER.option("--served-model", metavar="NAME", help="Its name there.  [default: the first]")
@SERVER.option(
    "--format",
    "form",
    type=click.Choice(("float32", "bfloat16", "float16", "fp8", "int8", "int4")),
    default="bfloat16",
    help="What the server computes in, for how near its answers must be.",
)
@options.report_option
@options.quiet_option("No progress bar.")
@options.json_option
def command(
    checkpoint_dir: str | None,
    *,
    model_dir: str | None,
    endpoint: str | None,
    quick: bool,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare a checkpoint with the model it was made from, or an engine with its checkpoint.

    Checks, weakest to strongest: structure and config.json, every byte, files and settings against
    what transformers reads, the logits against the source's own model, the ranks against themselves
    merged. Ends with 4 if one of them fails, and with 8 if one could not be made.

    Of an engine that phireg built: its files, the network that TensorRT was given and, on a GPU,
    the running engine, whose result goes into its manifest.
    """
    started = time.monotonic()
    from phireg.verification.result import ENDPOINT_CHECKS

    with ProgressBars(quiet) as bars:
        advance = {
            "weights": bars.bytes("comparing bytes", "comparing"),
            "logits": bars.count("comparing logits", "layers"),
            "ranks": bars.count("comparing ranks", "layers"),
            "network": bars.count("evaluating the network", "steps"),
            "running": bars.count("running the engine", "prompts"),
            **{
                name: bars.count(f"asking the server: {name}", "requests")
                for name in ENDPOINT_CHECKS
            },
        }
        verifications = list(
            _verifications(
                checkpoint_dir,
                endpoint,
                model_dir,
                quick,
                lambda check, more, total: advance[check](more, total),
                options,
            )
        )
    if report is not None:
        from phireg.report.page import write_page
        from phireg.report.verification import render_verification

        write_page(render_verification(verifications[-1], page_facts(started)), report)
    if as_json:
        document = verification_document(verifications[-1])
        if len(verifications) > 1:
            document["checkpoint"] = verification_document(verifications[0])
        emit_json(bounded(document))
    else:
        for verification in verifications:
            show_verification(verification)
    if code := exit_code(verifications):
        raise click.exceptions.Exit(code)


def _verifications(
    place: str | None,
    endpoint: str | None,
    model_dir: str | None,
    quick: bool,
    progress: Callable[[str, int, int], None],
    options: dict[str, Any],
) -> Iterator[Verification]:
    """Verify a checkpoint or a server; or an engine, and its checkpoint if there is a source."""
    from phireg.files.kinds import CHECKPOINT, ENGINE, HF_MODEL, check_kind, kind_of
    from phireg.tensorrt.engine import is_native, read_native
    from phireg.verification.result import CHECKS, QUICK

    served = {name: options.pop(name) for name in ("served_model", "form")}
    if endpoint is None and served["served_model"] is not None:
        raise UsageError("--served-model has no effect without --endpoint", hint="add --endpoint.")
    if endpoint is not None:
        if quick:
            raise UsageError(
                "--quick has no effect with --endpoint: a server's answers are compared",
                hint="leave one of them out.",
            )
        if (place is None) == (model_dir is None):
            raise UsageError(
                "--endpoint needs the model that the server serves",
                hint="give either --model-dir, the source model, or a checkpoint of it.",
            )
        yield phireg.verify_endpoint(
            endpoint,
            model_dir or place or "",
            model=served["served_model"],
            form=served["form"],
            device=options["device"],
            max_tokens=options["max_tokens"],
            progress=progress,
        )
        return
    if place is None:
        raise UsageError(
            "there is nothing to verify", hint="give a checkpoint, an engine, or --endpoint URL."
        )
    directory, checks = Path(place), QUICK if quick else tuple(CHECKS)
    if not is_native(directory):
        check_kind(directory, CHECKPOINT, ENGINE, HF_MODEL)
        if model_dir is None:
            raise UsageError(
                "there is nothing to compare with", hint="give --model-dir, the source model."
            )
        yield phireg.verify(directory, model_dir, checks=checks, progress=progress, **options)
        return
    checkpoint = read_native(directory).checkpoint_dir
    if model_dir is not None and kind_of(Path(model_dir)) is CHECKPOINT:
        checkpoint = Path(model_dir)
    elif model_dir is not None and checkpoint is not None:
        yield phireg.verify(checkpoint, model_dir, checks=checks, progress=progress, **options)
    yield phireg.verify_engine(
        directory,
        checkpoint,
        checks=("files",) if quick else None,
        device=options["device"],
        max_tokens=options["max_tokens"],
        progress=progress,
    )


def exit_code(verifications: Iterable[Verification]) -> int:
    """Return the exit code of a command that made these verifications."""
    verdicts = {verification.verdict for verification in verifications}
    if "failed" in verdicts:
        return CheckError.exit_code
    return IncompleteError.exit_code if "incomplete" in verdicts else 0


def verification_document(verification: Verification) -> dict[str, Any]:
    """Return the document that ``--json`` prints; docs/command-line.md describes it."""
    import dataclasses

    logits = None
    if verification.logits is not None:
        logits = dataclasses.asdict(verification.logits)
        logits["wrong_places"] = verification.logits.wrong_places
        logits["places"] = [
            {"layer": layer, "part": part, "error": error}
            for (layer, part), error in verification.logits.places
        ]
    return {
        "checkpoint_dir": verification.checkpoint_dir,
        "model_dir": verification.model_dir,
        "family": verification.family,
        "verdict": verification.verdict,
        "passed": verification.passed,
        "checks": verification.checks,
        "logits": logits,
        "provenance": dict(verification.provenance),
    }


def show_verification(verification: Verification) -> None:
    """Print the table of checks and the verdict."""
    rows = [row for check in verification.checks for row in _rows(check)]
    unmade, unasked = (", ".join(names) for names in (verification.unmade, verification.unasked))
    verdict = {
        "failed": Styled("not verified", fg="red", bold=True),
        "incomplete": Styled(f"incomplete; could not be checked: {unmade}", fg="yellow", bold=True),
        "verified in part": Styled(f"verified in part; not asked for: {unasked}", fg="green"),
        "verified": Styled("verified", fg="green"),
    }[verification.verdict]
    name = printable(verification.checkpoint_dir)
    emit(f"{columns(rows)}\n{name}: {click.style(verdict, **verdict.style)}", styled=True)


def _rows(check: Check) -> Iterator[tuple[str, str, str]]:
    styles: dict[str, dict[str, Any]] = {
        "passed": {"fg": "green"},
        "failed": {"fg": "red", "bold": True},
        "incomplete": {"fg": "yellow"},
        "skipped": {"fg": "yellow"},
        "not needed": {},
    }
    yield check.name, Styled(check.verdict, **styles[check.verdict]), printable(check.summary)
    sizes = [problem for problem in check.problems if problem.where.endswith(_SIZES)]
    problems = (sizes or check.problems)[:_MOST_PROBLEMS]
    for problem in problems:
        yield "", "", Styled(printable(problem.where), fg="red")
        yield "", "", f"  {printable(problem.text)}"
        if problem.hint:
            yield "", "", Styled(f"  {printable(problem.hint)}", dim=True)
    if more := len(check.problems) - len(problems):
        yield "", "", f"and {more} more; --json has all"
    for part in check.undone:
        yield "", "", Styled(printable(part), fg="yellow")
    for note in check.notes:
        yield "", "", Styled(f"note: {printable(note)}", dim=True)
