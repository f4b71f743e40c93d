"""What the process that compiles is told, and how it is started; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phireg.children import python_command
from phireg.tensorrt.engine import Limits
from phireg.tensorrt.package import Backend
from phireg.tensorrt.requirements import WeightsForm

MARK = "phireg: "
"""Before a line of progress: a JSON object with rank, phase and, in a phase, "done" and "of"."""

PROFILES = ("prompt", "generation")
"""The optimization profiles, in their order in the engine."""

_SCRIPT = "from phireg.tensorrt.compiler import main; main()"


@dataclass(frozen=True, slots=True)
class Job:
    """What to compile; it travels as JSON."""

    backend: Backend
    config: dict[str, Any]  # the checkpoint's config.json
    checkpoint: str | None  # its directory; None for an engine that gets no weights
    output: str  # the directory for rank{r}.engine
    gpus: tuple[str, ...]  # empty: the GPU here
    weights: WeightsForm
    limits: Limits
    workers: int


def command(job: Path) -> list[str]:
    """Return the command that compiles the job in a file."""
    return [*python_command(_SCRIPT), str(job)]


def record_path(job: Path, rank: int) -> Path:
    """Return the file beside a job in which the process leaves a rank's record or error."""
    return job.with_name(f"rank{rank}.json")
