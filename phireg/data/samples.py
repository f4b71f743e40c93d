"""Calibration samples: rows of token ids, unpadded."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import xxhash

from phireg.calibration.settings import AUTO, BUILTIN, CNN_DAILYMAIL, DEFAULT_SIZE, Settings
from phireg.data.rows import Row, cnn_dailymail, read_rows
from phireg.errors import UsageError

TEXT_KEYS = ("text", "article", "prompt")
"""Where a row's text is looked for, in this order."""

_SECONDS = 3.0
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")

Encode = Callable[[str], list[int]]
"""Text to token ids, with the special tokens that the tokenizer adds."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What to calibrate on.

    Attributes:
        rows: token ids of each sample, at least one.
        origin: where they are from, for one line of text.
    """

    rows: tuple[tuple[int, ...], ...]
    origin: str

    @property
    def tokens(self) -> int:
        """How many tokens there are in all."""
        return sum(map(len, self.rows))

    @property
    def digest(self) -> str:
        """xxh3_128 of the token ids, row by row, in hexadecimal."""
        hashed = xxhash.xxh3_128()
        for row in self.rows:
            hashed.update((" ".join(map(str, row)) + "\n").encode())
        return hashed.hexdigest()

    def first(self, count: int) -> Samples:
        """Only the first samples."""
        return Samples(self.rows[:count], self.origin)


def read_samples(settings: Settings, encode: Encode, *, vocab_size: int, longest: int) -> Samples:
    """The samples that the settings ask for: the first ones in order.

    A file's rows (`.jsonl`, `.csv`, `.parquet`, `.txt`) have ``input_ids``, a list of token ids
    that is taken as it is, or a text under one of ``TEXT_KEYS``. The built-in text has one sample
    per passage, which begins there and runs on into the following ones.

    Args:
        settings: which data, how many samples, how long.
        encode: the model's tokenizer; called only where there is text.
        vocab_size: ids must be below it.
        longest: tokens the model takes at most.

    Raises:
        UsageError: a row is empty, has no text, or has an id that the model does not know (file and
            line are named); there is no such dataset.
        PhiregError: a dataset that was asked for cannot be had.
    """
    limit = min(settings.max_length, longest)
    count = DEFAULT_SIZE if settings.size is None else settings.size
    found, origin = _rows(settings, count)
    rows = []
    for row in found[:count]:
        ids = _ids(row, encode, limit)
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UsageError(
                f"{row.where}: token id {wrong} is not one of the model's {vocab_size}",
                hint="the ids, or the tokenizer, are of another model.",
            )
        rows.append(tuple(ids))
    if len(rows) < count and settings.size is not None:
        origin += f" (which has {len(rows)} samples, not {count})"
    return Samples(tuple(rows), origin)


def _rows(settings: Settings, count: int) -> tuple[Sequence[Row], str]:
    if settings.file is not None:
        return read_rows(settings.file), str(settings.file)
    if settings.dataset == AUTO:
        reason = _no_dataset()
        if reason is not None:
            return _builtin(), f"the built-in text, because {reason}"
        return _articles(count, None), f"{CNN_DAILYMAIL} 3.0.0, train"
    if settings.dataset == BUILTIN:
        return _builtin(), "the built-in text"
    if settings.dataset == CNN_DAILYMAIL:
        return _articles(count, None), f"{CNN_DAILYMAIL} 3.0.0, train"
    if Path(settings.dataset).is_dir():
        return _articles(count, settings.dataset), f"{settings.dataset}, train"
    raise UsageError(
        f"unknown calibration dataset '{settings.dataset}'",
        hint=f"known: {CNN_DAILYMAIL}, a directory with a copy of it, {BUILTIN}; for other text "
        "use --calib-file.",
    )


def _articles(count: int, directory: str | None) -> list[Row]:
    rows = cnn_dailymail("train", count, dataset_dir=directory)
    return [Row(row.where, {"text": row.text("article")}) for row in rows]


def _builtin() -> list[Row]:
    text = resources.files(__package__).joinpath("builtin.txt").read_text(encoding="utf-8")
    passages = text.split("---\n")
    return [
        Row(f"built-in text, passage {number + 1}", {"text": "\n".join(passages[number:])})
        for number in range(len(passages))
    ]


def _no_dataset() -> str | None:
    """Why the dataset is not even tried, or None."""
    if importlib.util.find_spec("datasets") is None:
        return "the package 'datasets' is not installed"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in _PROXIES):
        return None  # only the proxy can tell
    place = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname, place.port or 443), _SECONDS).close()
    except OSError:
        return f"{place.hostname} cannot be reached"
    return None


def _ids(row: Row, encode: Encode, limit: int) -> list[int]:
    if "input_ids" in row.values:
        ids = _whole_numbers(row)[:limit]
    else:
        key = next((name for name in TEXT_KEYS if row.values.get(name) is not None), None)
        if key is None:
            raise UsageError(
                f"{row.where}: there is none of 'input_ids', {', '.join(map(repr, TEXT_KEYS))}",
                hint=f"the row has: {', '.join(map(str, row.values)) or 'nothing'}.",
            )
        text = row.text(key)
        ids = encode(text)[:limit] if text.strip() else []
    if not ids:
        raise UsageError(f"{row.where}: the row is empty", hint="remove it, or give it text.")
    return ids


def _whole_numbers(row: Row) -> list[int]:
    ids: Any = row.values["input_ids"]
    if not isinstance(ids, Iterable) or isinstance(ids, str):
        raise UsageError(f"{row.where}: 'input_ids' is no list of token ids")
    numbers = list(ids)
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            raise UsageError(f"{row.where}: 'input_ids' has {number!r}, which is no token id")
    return numbers
