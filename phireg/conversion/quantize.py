"""Quantizing: calibration, scales, and a checkpoint of quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.calibration.statistics import NO_STATISTICS, Statistics, statistics_beside
from phireg.conversion.convert import Converted, check_plan, write_checkpoint
from phireg.conversion.quantizer import WeightQuantizer
from phireg.conversion.scales import bytes_read, compute_scales, statistics_digest
from phireg.errors import PhiregError, UsageError
from phireg.planning.model import Plan

if TYPE_CHECKING:
    from phireg.calibration.calibrate import Calibrated, Tell
    from phireg.calibration.settings import Settings

StageProgress = Callable[[str, int, int], None]
"""Takes a stage, its further units and all of them: ``preparing`` the calibration (0, 0),
``calibrating`` (tokens through one layer), ``scales`` (bytes read), ``writing`` (bytes written).
May be called from worker threads."""


def quantize(
    plan: Plan,
    output_dir: str | Path,
    statistics: Statistics | str | Path | None = None,
    *,
    settings: Settings | None = None,
    alpha: float = 1.0,
    overwrite: bool = False,
    allow_overflow: bool = False,
    progress: StageProgress | None = None,
    tell: Tell | None = None,
) -> Converted:
    """Calibrate if the plan needs it, and write a quantized checkpoint.

    The output appears under its name complete, or not at all. Everything else is checked before
    the calibration starts, and every scale before the first byte is written.

    Args:
        plan: from :func:`phireg.plan` with ``qformat``.
        output_dir: the checkpoint to make; must not exist, or be empty.
        statistics: of the same source, or a file: it is used if it exists, else written. By
            default, a file beside the output, which is replaced if it does not fit.
        settings: samples of the calibration, and the device that computes it and quantizes.
        alpha: SmoothQuant's share of the activations, 0 to 1.
        overwrite: replace the output once the new one is complete, if it is recognizably a
            checkpoint.
        allow_overflow: let finite values of unquantized tensors become infinite in a cast.
        progress: takes the progress of each stage.
        tell: takes a line on the samples, on their cost, and on why a file does not fit.

    Raises:
        UsageError: the plan quantizes nothing, or the other arguments make no sense for it.
        PlanError: the plan has errors, the statistics do not belong to it, a scale cannot be used,
            or a cast overflowed.
        SourceError: a source file changed or could not be read, statistics do not fit, or the
            model has no tokenizer.
        OutputError: the output exists, or cannot be written.
    """
    target = Path(output_dir)
    _check_request(plan, statistics, alpha)
    check_plan(plan)
    report = progress or (lambda stage, more, total: None)
    quantization: dict[str, Any] = {"alpha": alpha if plan.smoothed else None}
    calibrated: Calibrated | None = None

    def quantizer() -> WeightQuantizer:
        from phireg.calibration.settings import Settings
        from phireg.device import pick_device, within_memory

        nonlocal calibrated
        chosen = settings or Settings()
        device = pick_device(chosen.device)
        maxima = None
        if isinstance(statistics, Statistics):
            maxima = statistics
        elif plan.options.calibrated:
            from phireg.calibration.calibrate import calibrate

            report("preparing", 0, 0)
            calibrated = calibrate(
                plan,
                statistics or statistics_beside(target),
                chosen,
                required=statistics is not None,
                progress=lambda more, total: report("calibrating", more, total),
                tell=tell,
            )
            maxima = calibrated.statistics
        if maxima is not None:
            quantization["statistics"] = {
                "digest": statistics_digest(maxima),
                "provenance": dict(maxima.provenance),
            }
        read = bytes_read(plan, alpha)
        with within_memory(device, "take --device cpu."):
            scales = compute_scales(
                plan,
                maxima or NO_STATISTICS,
                alpha=alpha,
                device=str(device),
                progress=lambda more: report("scales", more, read),
            )
        return WeightQuantizer(plan, scales, str(device))

    total = plan.tensor_bytes
    try:
        converted = write_checkpoint(
            plan,
            target,
            overwrite=overwrite,
            allow_overflow=allow_overflow,
            progress=lambda more: report("writing", more, total),
            quantizer=quantizer if plan.scales else None,
            quantization=quantization if plan.scales else None,
        )
    except PhiregError as error:
        if calibrated is None or calibrated.reused:
            raise
        kept = f"\n  the calibration statistics are kept in {calibrated.file}"
        raise type(error)(error.message + kept, hint=error.hint) from None
    return replace(converted, calibrated=calibrated)


def _check_request(plan: Plan, statistics: Statistics | str | Path | None, alpha: float) -> None:
    qformat = plan.options.qformat
    if qformat is None:
        raise UsageError("this plan quantizes nothing", hint="plan with a qformat, or convert.")
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha {alpha} is not between 0 and 1")
    if alpha != 1 and not plan.smoothed:
        raise UsageError(
            f"alpha {alpha} has no effect on {qformat}",
            hint="it is SmoothQuant's (int8_sq); leave it out.",
        )
    if isinstance(statistics, str | Path) and not plan.options.calibrated:
        raise UsageError(
            f"calibration statistics have no effect: {qformat} without a quantized KV cache needs "
            "no calibration",
            hint="leave them out (--calib-stats).",
        )
