"""The text that a report is measured on: of the calibration's kind, and not calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phireg.calibration.settings import Settings
from phireg.data.samples import DEFAULT_SIZE, Encode, Samples, read_samples

_FURTHER = 64
"""Samples that are read behind those that were calibrated on."""


@dataclass(frozen=True, slots=True)
class Text:
    """What to measure on.

    Attributes:
        rows: token ids of each sample, two or more.
        origin: where they are from.
        calibrated: whether the statistics were taken from them.
    """

    rows: tuple[tuple[int, ...], ...]
    origin: str
    calibrated: bool


def choose_text(
    settings: Settings,
    provenance: Mapping[str, Any] | None,
    encode: Encode,
    *,
    tokens: int,
    vocab_size: int,
    longest: int,
) -> Text:
    """The samples behind those that were calibrated on, or if there are none, the first ones.

    Args:
        settings: which data.
        provenance: of the statistics; None if nothing was calibrated.
        encode: the model's tokenizer.
        tokens: how many there may be in all; the last sample is cut off there.
        vocab_size: of the model.
        longest: tokens the model takes at most.

    Raises:
        UsageError: a sample is not one; see ``phireg.data.samples``.
        PhiregError: the data cannot be had.
    """

    def read(size: int | None) -> Samples:
        length = min(settings.max_length, longest)
        return read_samples(
            settings.source, encode, size=size, max_length=length, vocab_size=vocab_size
        )

    samples = read(None)
    used = 0
    if provenance is not None:
        used = int(provenance["samples"])
        if used >= DEFAULT_SIZE:
            samples = Samples(read(used + _FURTHER).rows, samples.origin)
        if samples.first(used).digest != provenance["data_digest"]:
            used = 0  # statistics of other text
    further = [row for row in samples.rows[used:] if len(row) > 1]
    rows: list[tuple[int, ...]] = []
    for row in further or samples.rows:
        kept = row[: tokens - sum(map(len, rows))]
        if len(kept) < 2:
            break
        rows.append(kept)
    return Text(tuple(rows), samples.origin, used > 0 and not further)
