"""``phireg quantize``: from a Hugging Face model to a quantized TensorRT-LLM checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli.calib_options import DATA_OPTIONS, calibration_options, make_settings
from phireg.cli.errors import findings_text, interruptible
from phireg.cli.options import (
    allow_overflow_option,
    check_file,
    json_option,
    kv_cache_option,
    model_dir_option,
    output_dir_option,
    overwrite_option,
    qformat_option,
    quiet_option,
    report_option,
    source_options,
)
from phireg.cli.output import ProgressBars, emit, emit_json, printable
from phireg.cli.quantized import Done, done_document, done_text
from phireg.errors import CheckError, PhiregError, SourceError, UsageError

if TYPE_CHECKING:
    from phireg.calibration.calibrate import Calibrated
    from phireg.calibration.settings import Settings
    from phireg.calibration.statistics import Statistics
    from phireg.conversion.convert import Converted
    from phireg.planning.model import Plan
    from phireg.quality.result import Quality


@click.command()
@model_dir_option
@output_dir_option("checkpoint")
@qformat_option(required=True)
@kv_cache_option
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    help="int8_sq: how much of the inputs' range moves into the weights.  [default: 1]",
)
@source_options
@calibration_options
@overwrite_option("checkpoint")
@allow_overflow_option
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Compare with the unquantized model.  [default: if that takes minutes at most]",
)
@report_option
@quiet_option("No progress bars and no summary.")
@json_option
def command(output_dir: str, **options: Any) -> None:
    """Quantize a model to a TensorRT-LLM checkpoint.

    Everything that can be checked is checked before calibration starts. The statistics are kept,
    so that another format, or another attempt, need not calibrate again.
    """
    run = _Run(Path(output_dir), **options)
    with interruptible(output_dir, lambda: f"nothing was written{run.kept()}"):
        run.start()


class _Run:
    """One quantization, from plan to summary."""

    def __init__(
        self,
        output_dir: Path,
        *,
        calib_stats: str | None,
        alpha: float | None,
        overwrite: bool,
        allow_overflow: bool,
        measure: bool | None,
        report: str | None,
        quiet: bool,
        as_json: bool,
        **options: Any,
    ) -> None:
        self.output_dir = output_dir
        self.stats = None if calib_stats is None else Path(calib_stats)
        self.alpha = 1.0 if alpha is None else alpha
        self.how = {"overwrite": overwrite, "allow_overflow": allow_overflow}
        self.wanted = measure
        self.report = None if report is None else Path(report)
        self.quiet = quiet
        self.as_json = as_json
        self.options = options
        self.calibrated: Calibrated | None = None
        self.unmeasured: str | None = None
        self.warned = False
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Do all of it, and print the summary."""
        started = time.monotonic()
        data = {name: self.options.pop(name) for name in DATA_OPTIONS}
        settings = make_settings(**data)
        plan = phireg.plan(**self.options)
        self.check(plan, settings)
        with ProgressBars(self.quiet) as stages:
            converted = self.write(plan, settings, stages)
            found = self.measure(plan, settings, stages)
        if found is not None and self.report is not None:
            from phireg.report.page import write_page
            from phireg.report.quality import render_quality

            write_page(render_quality(found), self.report)
        self.seconds["all"] = time.monotonic() - started
        done = Done(
            plan,
            converted,
            self.calibrated,
            self.alpha,
            found,
            self.unmeasured,
            self.warned,
            self.report,
            self.seconds,
        )
        if self.as_json:
            emit_json(done_document(done))
        elif not self.quiet:
            emit(done_text(done))

    def check(self, plan: Plan, settings: Settings) -> None:
        """What the export does not check itself before it calibrates."""
        from phireg.conversion.convert import check_plan

        check_plan(plan)
        options = plan.options
        if self.stats is not None and not options.calibrated:
            raise UsageError(
                f"--calib-stats has no effect: {options.qformat} without a quantized KV cache "
                "needs no calibration",
                hint="leave it out.",
            )
        if self.stats is not None and not self.stats.is_file():  # one that exists is only read
            check_file(self.stats, "--calib-stats")
        if self.report is not None:
            if self.wanted is False:
                raise UsageError("--report has no effect with --no-measure", hint="leave one out.")
            self.wanted = True
            check_file(self.report, "--report")
        if options.calibrated or self.wanted is not False:
            from phireg.device import pick_device

            pick_device(settings.device)

    def write(self, plan: Plan, settings: Settings, stages: ProgressBars) -> Converted:
        """Calibrate if need be, and export."""
        from phireg.conversion.scales import bytes_read

        file = self.stats or phireg.statistics_beside(self.output_dir)

        def statistics() -> Statistics:
            begun = time.monotonic()
            stages.spinner("preparing the calibration")
            self.calibrated = phireg.calibrate(
                plan,
                file,
                settings,
                required=self.stats is not None,
                progress=stages.count("calibrating", "tokens x layers"),
                tell=self.teller(plan, stages),
            )
            stages.close()
            self.seconds["calibration"] = time.monotonic() - begun
            if self.calibrated.reused:
                self.say(f"statistics of an earlier calibration serve: {file}")
            return self.calibrated.statistics

        total = phireg.quantize_bytes(plan, self.alpha)
        try:
            converted = phireg.quantize(
                plan,
                self.output_dir,
                statistics,
                alpha=self.alpha,
                progress=_export_progress(stages, bytes_read(plan, self.alpha), total),
                **self.how,
            )
        except PhiregError as error:
            raise type(error)(error.message + self.kept("\n  "), hint=error.hint) from None
        stages.close()
        return converted

    def teller(self, plan: Plan, stages: ProgressBars) -> Callable[[str], None]:
        """What tells the calibration's choices; warnings come first, before anybody waits."""
        from phireg.findings import Severity

        warnings = findings_text(plan.findings, Severity.WARNING)

        def tell(line: str) -> None:
            stages.close()
            if warnings and not self.warned:
                self.say(warnings)
            self.warned = True
            self.say(line)

        return tell

    def measure(self, plan: Plan, settings: Settings, stages: ProgressBars) -> Quality | None:
        """The report's numbers; None if there are none, and then why."""
        from phireg.device import pick_device
        from phireg.quality import run

        if self.wanted is False:
            return None
        if self.wanted is None:
            tokens = run.affordable(plan, pick_device(settings.device))
            if tokens < run.FEWEST:
                self.unmeasured = "it would take long on a CPU; --measure does it"
                return None
        begun = time.monotonic()
        provenance = None if self.calibrated is None else self.calibrated.provenance
        try:
            found = run.measure(
                plan,
                self.output_dir,
                settings,
                provenance=provenance,
                progress=stages.count("measuring", "layers"),
            )
        except PhiregError as error:
            if self.wanted is None and isinstance(error, SourceError | CheckError):
                self.unmeasured = error.message
                return None
            message = f"{self.output_dir} is complete, but measuring it failed: {error.message}"
            raise type(error)(message, hint=error.hint) from None
        stages.close()
        self.seconds["measurement"] = time.monotonic() - begun
        return found

    def say(self, line: str) -> None:
        """Tell something while the work goes on."""
        if not self.quiet:
            click.echo(printable(line), err=True)

    def kept(self, before: str = "; ") -> str:
        """That a calibration is not lost."""
        if self.calibrated is None or self.calibrated.reused:
            return ""
        return f"{before}the calibration statistics are kept in {self.calibrated.file}"


def _export_progress(bars: ProgressBars, scales: int, total: int) -> Callable[[int], None]:
    """Show two bars: of the bytes read for the scales, which come first, and of those written."""
    reading = bars.bytes("computing scales", "scales")
    writing = bars.bytes("writing", "flushing to disk")
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        if done < scales:
            reading(more, scales)
        else:
            writing(more, total - scales)
        done += more

    return advance
