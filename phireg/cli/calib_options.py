"""Options of a calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phireg.cli.options import device_option
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.calibration.settings import Settings

_Function = TypeVar("_Function", bound=Callable[..., Any])

_COUNT = click.IntRange(min=1)

DATA_OPTIONS = (
    "calib_dataset",
    "calib_file",
    "calib_size",
    "calib_max_seq_length",
    "batch_size",
    "seed",
    "device",
)
"""Parameters of :func:`make_settings`."""


def calibration_options(function: _Function) -> _Function:
    """Which samples, where, and where the statistics are; names are those of upstream's script."""
    for option in reversed(
        (
            click.option(
                "--calib-dataset",
                default="auto",
                show_default=True,
                metavar="NAME|DIR",
                help="cnn_dailymail, a directory with it, or builtin; auto takes what can be had.",
            ),
            click.option(
                "--calib-file",
                type=click.Path(),
                metavar="FILE",
                help="Text of your own: .txt, .jsonl, .csv or .parquet; rows may have input_ids.",
            ),
            click.option(
                "--calib-size",
                type=_COUNT,
                metavar="N",
                help="Samples.  [default: 512; on a CPU what ends]",
            ),
            click.option(
                "--calib-max-seq-length",
                type=_COUNT,
                default=512,
                show_default=True,
                metavar="N",
                help="Tokens of a sample at most.",
            ),
            click.option(
                "--batch-size",
                type=_COUNT,
                default=1,
                show_default=True,
                metavar="N",
                help="Of calibration.",
            ),
            click.option(
                "--seed",
                type=int,
                default=1234,
                show_default=True,
                help="Recorded; nothing is drawn.",
            ),
            device_option,
            click.option(
                "--calib-stats",
                type=click.Path(),
                metavar="FILE",
                help="Statistics, used if they exist, else kept.  [default: beside the output]",
            ),
        )
    ):
        function = option(function)
    return function


def make_settings(
    *,
    calib_dataset: str,
    calib_file: str | None,
    calib_size: int | None,
    calib_max_seq_length: int,
    batch_size: int,
    seed: int,
    device: str,
) -> Settings:
    """The settings that :func:`calibration_options` ask for.

    Raises:
        UsageError: there is no such file, or the options contradict each other.
    """
    from phireg.calibration.settings import Settings

    file = None if calib_file is None else Path(calib_file)
    if file is not None and not file.is_file():
        raise UsageError(f"{file}: no such file", hint="--calib-file names sample texts.")
    return Settings(calib_dataset, file, calib_size, calib_max_seq_length, batch_size, device, seed)
