"""``phireg quantize``: from a Hugging Face model to a quantized TensorRT-LLM checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli import options
from phireg.cli.convert import conversion_document, file_rows, loss_findings, steps_after
from phireg.cli.errors import findings_text, identity, interruptible
from phireg.cli.help import CALIBRATION, OUTPUT, QUANTIZATION, documented
from phireg.cli.output import ProgressBars, columns, emit, emit_json, folded, page_facts, printable
from phireg.cli.plan import family_text, format_text, warnings_text
from phireg.cli.quality import quality_document, quality_text
from phireg.errors import PhiregError, UsageError

if TYPE_CHECKING:
    from phireg.calibration.calibrate import Calibrated
    from phireg.calibration.settings import Settings
    from phireg.conversion.convert import Converted
    from phireg.findings import Finding
    from phireg.planning.model import Plan
    from phireg.quality.result import Quality

_SETTINGS = ("dataset", "file", "size", "max_length", "batch_size", "seed", "device")

calibration_options = options.compose(
    CALIBRATION.option(
        "--calib-dataset",
        "dataset",
        default="auto",
        metavar="NAME|DIR",
        help="cnn_dailymail, a directory with it, or builtin; auto takes what can be had.",
    ),
    CALIBRATION.option(
        "--calib-file",
        "file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Text of your own: .txt, .jsonl, .csv or .parquet; rows may have input_ids.",
    ),
    CALIBRATION.option(
        "--calib-size",
        "size",
        type=options.COUNT,
        help="Samples.  [default: 512; on a CPU what ends]",
    ),
    CALIBRATION.option(
        "--calib-max-seq-length",
        "max_length",
        type=options.COUNT,
        default=512,
        help="Tokens of a sample at most.",
    ),
    CALIBRATION.option(
        "--batch-size",
        type=options.COUNT,
        help="Of calibration.  [default: what a GPU takes; 1 on a CPU]",
    ),
    CALIBRATION.option(
        "--seed", type=int, default=1234, metavar="N", help="Recorded; nothing is drawn.", rare=True
    ),
    options.device_option,
    CALIBRATION.option(
        "--calib-stats",
        type=click.Path(),
        metavar="FILE",
        help="Statistics, used if they exist, else kept.  [default: beside the output]",
    ),
)
"""Names are those of TensorRT-LLM's quantize.py; parameters those of the calibration settings."""


@documented(
    "phireg quantize --model-dir ./phi-2 --output-dir ckpt-fp8 --qformat fp8",
    "phireg quantize --model-dir ./phi-2 --output-dir ckpt-int4 --qformat int4_wo",
    page="quantize.md",
    waits="reading the model",
)
@options.model_dir_option(required=True)
@options.output_dir_option("checkpoint")
@options.qformat_option(required=True)
@options.kv_cache_option
@options.exclude_option
@options.head_option
@QUANTIZATION.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    metavar="X",
    help="int8_sq: how much of the inputs' range moves into the weights.  [default: 1]",
)
@options.source_options
@calibration_options
@options.overwrite_option("checkpoint")
@options.allow_overflow_option
@OUTPUT.option(
    "--measure/--no-measure",
    default=None,
    help="Compare with the unquantized model.  [default: if that takes minutes at most]",
)
@options.report_option
@options.quiet_option("No progress bars and no summary.")
@options.json_option
def command(
    output_dir: str,
    alpha: float | None,
    calib_stats: str | None,
    overwrite: bool,
    allow_overflow: bool,
    measure: bool | None,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize a model to a TensorRT-LLM checkpoint.

    Everything that can be checked is checked before calibration starts. The statistics are kept,
    so that another format, or another attempt, need not calibrate again.
    """
    from phireg.calibration.settings import Settings
    from phireg.calibration.statistics import statistics_beside

    started = time.monotonic()
    statistics = Path(calib_stats) if calib_stats else statistics_beside(Path(output_dir))
    before = identity(statistics)

    def unwritten() -> str:
        kept = identity(statistics) not in (None, before)
        return "nothing was written" + (
            f"; the calibration statistics are kept in {statistics}" if kept else ""
        )

    with interruptible(output_dir, unwritten):
        settings = Settings(**{name: options.pop(name) for name in _SETTINGS})
        plan = phireg.plan(**options)
        _check(plan, calib_stats, report, measure, settings.device)
        if measure is False:
            plan = _settled(plan, None)
        alpha = 1.0 if alpha is None else alpha
        with ProgressBars(quiet) as bars:
            events = _Events(plan, bars, quiet)
            converted = phireg.quantize(
                plan,
                output_dir,
                calib_stats,
                settings=settings,
                alpha=alpha,
                overwrite=overwrite,
                allow_overflow=allow_overflow,
                progress=events.progress,
                tell=events.tell,
            )
            bars.close()
            result = _Result(plan, converted, alpha, report, events.warned, events.seconds)
            _measure(result, settings, True if report else measure, bars)
            result.plan = _settled(plan, result.quality)
        if report and result.quality is not None:
            from phireg.report.page import write_page
            from phireg.report.quality import render_quality

            write_page(render_quality(result.quality, page_facts(started)), report)
        result.seconds["all"] = time.monotonic() - started
        if as_json:
            emit_json(_document(result))
        elif not quiet:
            emit(_text(result))


def _settled(plan: Plan, quality: Quality | None) -> Plan:
    from phireg.quality.result import settled

    return replace(plan, findings=tuple(settled(f, quality) for f in plan.findings))


def _check(
    plan: Plan, calib_stats: str | None, report: Path | None, measure: bool | None, device: str
) -> None:
    """Check what phireg.quantize does not check, or only after the checkpoint is written."""
    if calib_stats and plan.options.calibrated and not Path(calib_stats).is_file():
        options.check_file(Path(calib_stats), "--calib-stats")
    if report and measure is False:
        raise UsageError("--report has no effect with --no-measure", hint="leave one out.")
    if plan.options.calibrated or measure is not False:
        from phireg.device import pick_device

        pick_device(device)


class _Events:
    """Shows the progress of a quantization, and measures its calibration."""

    def __init__(self, plan: Plan, bars: ProgressBars, quiet: bool) -> None:
        self.plan = plan
        self.bars = bars
        self.quiet = quiet
        self.warned: tuple[Finding, ...] = ()
        self.seconds: dict[str, float] = {}
        self._started: float | None = None
        self._stages = {
            "calibrating": bars.count("calibrating", "tokens x layers"),
            "scales": bars.bytes("computing scales", "scales"),
            "writing": bars.bytes("writing", "flushing to disk"),
        }

    def progress(self, stage: str, more: int, total: int) -> None:
        if stage == "preparing":
            self._started = time.monotonic()
            self.bars.spinner("preparing the calibration")
            return
        if stage != "calibrating" and self._started is not None:
            self.seconds["calibration"] = time.monotonic() - self._started
            self._started = None
        self._stages[stage](more, total)

    def tell(self, line: str) -> None:
        """Print a line; the plan's warnings come first, before the user waits."""
        from phireg.findings import Severity

        self.bars.close()
        if self.quiet:
            return
        warnings = findings_text(self.plan.findings, Severity.WARNING)
        if warnings and not self.warned:
            click.echo(printable(warnings), err=True)
        self.warned = self.plan.findings
        click.echo(folded("", line), err=True)


@dataclass(slots=True)
class _Result:
    plan: Plan
    converted: Converted
    alpha: float
    report: Path | None  # the page, if one is written
    warned: tuple[Finding, ...]  # the plan's, if its warnings were printed before the calibration
    seconds: dict[str, float]  # by part; ``all`` of them
    quality: Quality | None = None
    unmeasured: str | None = None  # the reason, unless the user refused it


def _measure(result: _Result, settings: Settings, measure: bool | None, bars: ProgressBars) -> None:
    """Measure the quality, if the user asks for it (True) or it takes minutes at most (None)."""
    if measure is False:
        return

    from phireg.device import pick_device
    from phireg.quality import run

    if measure is None and run.affordable(result.plan, pick_device(settings.device)) < run.FEWEST:
        result.unmeasured = "it would take long on a CPU; --measure does it"
        return
    started = time.monotonic()
    bars.spinner("preparing the measurement")
    calibrated = result.converted.calibrated
    try:
        result.quality = run.measure(
            result.plan,
            result.converted.output_dir,
            settings,
            provenance=calibrated.statistics.provenance if calibrated else None,
            progress=bars.count("measuring", "layers"),
        )
    except PhiregError as error:
        if measure is None:
            result.unmeasured = error.message
            return
        place = f"{result.converted.output_dir} is complete, but measuring it failed"
        raise type(error)(f"{place}: {error.message}", hint=error.hint) from None
    result.seconds["measurement"] = time.monotonic() - started
    if not result.plan.target.by_rank:
        from phireg.conversion.card import add_quality
        from phireg.files.kinds import file_sizes

        text = f"{result.quality.summary}. Text: {result.quality.text.description}."
        if not isinstance(written := result.quality.continuation, str):  # as code: it is any text
            text += "\n" + "".join(f"\n    {label}: {line}" for label, line in written.rows)
        directory, record = result.converted.output_dir, result.converted.quantization
        add_quality(directory, result.plan, record, text)
        result.converted = replace(result.converted, files=file_sizes(directory))


def _text(result: _Result) -> str:
    from phireg.findings import Severity

    plan = result.plan
    parts = ", ".join(f"{k} {part:.1f} s" for k, part in result.seconds.items() if k != "all")
    rows = [
        ("family", family_text(plan)),
        ("format", format_text(plan)),
        *_calibration_rows(result.converted.calibrated),
        *file_rows(plan, result.converted),
        ("time", f"{result.seconds['all']:.1f} s" + (f" ({parts})" if parts else "")),
    ]
    if result.report is not None:
        rows.append(("report", str(result.report)))
    if result.unmeasured is not None:
        rows.append(("quality", f"not measured: {result.unmeasured}"))
    findings = [
        finding
        for finding in plan.findings
        if not (finding in result.warned and finding.severity is Severity.WARNING)
    ]
    blocks = (
        columns(rows),
        quality_text(result.quality) if result.quality else "",
        warnings_text(plan),
        findings_text((*loss_findings(result.converted), *findings)),
        steps_after(plan, result.converted),
    )
    return "\n".join(filter(None, blocks))


def _calibration_rows(calibrated: Calibrated | None) -> list[tuple[str, str]]:
    if calibrated is None:
        return []
    from phireg.calibration.calibrate import describe

    verb = "taken from" if calibrated.reused else "kept in"
    return [
        ("scales", describe(calibrated.statistics.provenance)),
        ("", f"statistics {verb} {calibrated.file}"),
    ]


def _document(result: _Result) -> dict[str, Any]:
    plan, calibrated = result.plan, result.converted.calibrated
    return {
        **conversion_document(plan, result.converted),
        "alpha": result.alpha if plan.smoothed else None,
        "calibration": calibrated
        and {
            "file": str(calibrated.file),
            "reused": calibrated.reused,
            "provenance": dict(calibrated.statistics.provenance),
        },
        "quality": result.quality and quality_document(result.quality),
        "unmeasured": result.unmeasured,
        "report": result.report,
        "seconds": {name: round(part, 3) for name, part in result.seconds.items()},
    }
