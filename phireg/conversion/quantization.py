"""Writing a quantized checkpoint from calibration statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phireg.calibration.statistics import Statistics
from phireg.conversion.convert import Converted, check_plan, write_checkpoint
from phireg.conversion.quantizer import Quantizer
from phireg.conversion.scales import bytes_read, compute_scales, statistics_digest
from phireg.conversion.stream import Progress
from phireg.errors import UsageError
from phireg.planning.model import Plan


def quantize(
    plan: Plan,
    output_dir: str | Path,
    statistics: Statistics | Callable[[], Statistics] | None,
    *,
    alpha: float = 1.0,
    overwrite: bool = False,
    allow_overflow: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a quantized checkpoint. It appears under its name complete, or not at all.

    Every scale is computed and checked before the first byte is written.

    Args:
        plan: from :func:`phireg.planning.plan` with ``qformat``.
        output_dir: the checkpoint to make; must not exist, or be empty.
        statistics: from calibrating the same source, or a function that calibrates: it is called
            if the plan needs statistics and nothing else stands against it, the output included,
            which other runs cannot take meanwhile. None will do for a plan that needs none
            (weight-only with an unquantized KV cache).
        alpha: SmoothQuant's share of the activations, 0 to 1.
        overwrite: replace it, if it is recognisably a checkpoint, once the new one is complete.
        allow_overflow: let finite values of unquantized tensors become infinite in a cast.
        progress: told how many more bytes have been read for the scales or written, in all
            :func:`quantize_bytes`; called from worker threads.

    Raises:
        UsageError: the plan quantizes nothing, statistics are needed, or alpha makes no sense.
        PlanError: the plan has errors, the statistics do not belong to it, a scale cannot be used,
            or a cast overflowed.
        SourceError: a source file changed or could not be read.
        OutputError: the output exists, or cannot be written.
    """
    options = plan.options
    if options.scheme is None:
        raise UsageError("this plan quantizes nothing", hint="plan with a qformat, or convert.")
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha {alpha} is not between 0 and 1")
    if alpha != 1 and not options.scheme.per_channel:
        raise UsageError(
            f"alpha {alpha} has no effect on {options.qformat}",
            hint="it is SmoothQuant's (int8_sq); leave it out.",
        )
    check_plan(plan)
    if not options.calibrated:
        return write_checkpoint(
            plan,
            Path(output_dir),
            overwrite=overwrite,
            allow_overflow=allow_overflow,
            progress=progress,
        )
    if statistics is None:
        raise UsageError("this plan needs calibration statistics", hint="calibrate first.")

    quantization: dict[str, Any] = {"alpha": alpha if options.scheme.per_channel else None}

    def quantizer() -> Quantizer:
        found = statistics() if callable(statistics) else statistics
        quantization["statistics"] = {
            "digest": statistics_digest(found),
            "provenance": dict(found.provenance),
        }
        return Quantizer(plan, compute_scales(plan, found, alpha=alpha, progress=progress))

    return write_checkpoint(
        plan,
        Path(output_dir),
        overwrite=overwrite,
        allow_overflow=allow_overflow,
        progress=progress,
        quantizer=quantizer,
        quantization=quantization,
    )


def quantize_bytes(plan: Plan, alpha: float = 1.0) -> int:
    """What :func:`quantize` tells its ``progress`` in all: bytes read for scales, and written."""
    written = plan.bytes_out - sum(map(len, plan.headers))
    return bytes_read(plan, alpha) + written
