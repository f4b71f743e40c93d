"""Calibration statistics for a plan: from a file if they serve, else taken and kept in one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phireg.calibration.settings import Settings
from phireg.calibration.statistics import Statistics, load, save
from phireg.errors import OutputError, SourceError
from phireg.planning.model import Plan

SUFFIX = ".calib.safetensors"
"""What the name of an output is followed by in that of its statistics."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Statistics and where they are kept.

    Attributes:
        statistics: the maxima.
        file: the file.
        reused: whether they were there already.
    """

    statistics: Statistics
    file: Path
    reused: bool

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the statistics come from."""
        return self.statistics.provenance


def statistics_beside(output_dir: Path) -> Path:
    """Where the statistics of an output are kept if nothing else is said."""
    return output_dir.parent / f"{output_dir.name}{SUFFIX}"


def check_writable(path: Path, what: str) -> None:
    """Refuse a file that could not be written later.

    Raises:
        OutputError: it is a directory, or its directory cannot be written to.
    """
    if path.is_dir():
        raise OutputError(f"{what} {path} is a directory", hint="give the name of a file.")
    nearest = path.absolute().parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(
            f"{what} {path} cannot be written: no permission, or no directory",
            hint="give a place where you may write.",
        )


def calibrate(
    plan: Plan,
    file: str | Path,
    settings: Settings,
    *,
    required: bool = False,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Calibrated:
    """Statistics from a file if they serve for this source, else taken now and kept there.

    They are saved before anything else is done with them, so a failed export need not calibrate
    again, and other formats, dtypes and numbers of ranks of the same source need not either.

    Args:
        plan: from :func:`phireg.planning.plan`.
        file: statistics; replaced if they do not serve.
        settings: which samples. Statistics that were made with others do not serve.
        required: a file that exists must serve. It may have been made with other settings, as long
            as ``settings`` has only defaults.
        progress: told (how many more tokens went through one layer, how many will in all).
        tell: told what is calibrated on, what that costs, and why a file does not serve.

    Raises:
        UsageError: the settings make no sense.
        SourceError: the file is damaged, or required and of another source; the model or its
            tokenizer cannot be read; a maximum is not finite.
        OutputError: the file cannot be written.
    """
    from phireg.calibration.run import calibrate as run
    from phireg.calibration.run import misfit, reuse

    path, source = Path(file), plan.source
    say = tell or (lambda line: None)
    if required and path.exists():
        found = load(path)
        reason = misfit(found, source, None if _defaults(settings) else settings)
        if reason is not None:
            raise SourceError(
                f"{path} does not serve as calibration statistics: {reason}",
                hint="name the file of this model and these settings, or one that does not exist: "
                "it will be written.",
            )
        return Calibrated(found, path, True)
    earlier = reuse(path, source, settings, say)
    if earlier is not None:
        return Calibrated(earlier, path, True)
    check_writable(path, "the calibration statistics")
    taken = run(plan.chosen.family, source, settings, progress=progress, tell=tell)
    save(path, taken)
    return Calibrated(taken, path, False)


def _defaults(settings: Settings) -> bool:
    """Whether nothing is asked for that decides about maxima."""
    return settings == Settings(batch_size=settings.batch_size, device=settings.device)
