"""Settings of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phireg.data.rows import AUTO
from phireg.data.samples import DEFAULT_SIZE
from phireg.errors import UsageError


@dataclass(frozen=True, slots=True)
class Settings:
    """Calibration settings; names and defaults are those of TensorRT-LLM's quantize.py.

    Attributes:
        dataset: ``cnn_dailymail``; a directory with a copy of it; ``builtin`` for the text that
            phireg brings along; ``auto`` for the first where the hub can be reached and the
            ``datasets`` package is installed, and the built-in text elsewhere.
        file: the user's rows in place of a dataset; see ``phireg.data.samples``.
        size: number of samples; None for 512, or on a CPU as many as end in reasonable time.
        max_length: tokens after which a sample is cut off.
        batch_size: number of samples of the same length that run at once; None for what a GPU's
            memory takes, and one on a CPU. Maxima do not depend on it (apart from rounding), and
            nothing is ever padded.
        device: ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` for a GPU where there is one.
        seed: recorded, and without effect: samples are the first ones in order, as upstream's are,
            and nothing else is drawn at random.

    Raises:
        UsageError: a number is not positive, or both a dataset and a file are named.
    """

    dataset: str = AUTO
    file: Path | None = None
    size: int | None = None
    max_length: int = 512
    batch_size: int | None = None
    device: str = AUTO
    seed: int = 1234

    def __post_init__(self) -> None:
        numbers = {
            "calibration size": DEFAULT_SIZE if self.size is None else self.size,
            "calibration length": self.max_length,
            "batch size": 1 if self.batch_size is None else self.batch_size,
        }
        for what, number in numbers.items():
            if number < 1:
                raise UsageError(f"{what} {number} makes no sense", hint="use 1 or more.")
        if self.file is not None and self.dataset != AUTO:
            raise UsageError(
                f"both a calibration file ({self.file}) and a dataset ({self.dataset}) are named",
                hint="give one of them.",
            )

    @property
    def source(self) -> str:
        """The file or dataset, as :func:`phireg.data.samples.read_samples` takes it."""
        return self.dataset if self.file is None else str(self.file)
