"""Calibration samples: rows of token ids, unpadded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import xxhash

from phireg.data.rows import Data, Row, load_rows
from phireg.errors import UsageError

BUILTIN = "builtin"
DEFAULT_SIZE = 512  # samples, as TensorRT-LLM's quantization scripts take
TEXT_COLUMNS = ("text", "article", "prompt")  # in order of preference
Encode = Callable[[str], list[int]]  # with the special tokens that the tokenizer adds


@dataclass(frozen=True, slots=True)
class Samples:
    """Data to calibrate on."""

    rows: tuple[tuple[int, ...], ...]  # token ids of each sample, at least one
    origin: str  # of the data, as one line of text

    @property
    def tokens(self) -> int:
        """The number of tokens in all."""
        return sum(map(len, self.rows))

    @property
    def digest(self) -> str:
        """xxh3_128 of the token ids, row by row, in hexadecimal."""
        hasher = xxhash.xxh3_128()
        for row in self.rows:
            hasher.update((" ".join(map(str, row)) + "\n").encode())
        return hasher.hexdigest()

    def first(self, count: int) -> Samples:
        """Keep only the first samples."""
        return Samples(self.rows[:count], self.origin)


def read_samples(
    source: str, encode: Encode, *, size: int | None, max_length: int, vocab_size: int
) -> Samples:
    """Read the first samples of the data, in order.

    A row has ``input_ids``, a list of token ids that is taken as it is, or a text in one of
    ``TEXT_COLUMNS``. The built-in text has one sample per passage, which begins there and runs on
    into the following ones.

    The source is as of ``load_rows``: the train split of cnn_dailymail, and "builtin" for the text
    that phireg contains. A size of None is 512, or as many as there are.
    """
    count = DEFAULT_SIZE if size is None else size
    data = load_rows(source, "train", count, {BUILTIN: _builtin})
    origin = data.name if data.note is None else f"{data.name}, because {data.note}"
    rows = []
    for row in data.rows[:count]:
        ids = _token_ids(row, encode, max_length)
        unknown = next((token for token in ids if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise UsageError(
                f"{row.where}: token id {unknown} is not one of the model's {vocab_size}",
                hint="the ids, or the tokenizer, are of another model.",
            )
        rows.append(tuple(ids))
    if len(rows) < count and size is not None:
        origin += f" (which has {len(rows)} samples, not {count})"
    return Samples(tuple(rows), origin)


def _builtin() -> Data:
    text = resources.files(__package__).joinpath("builtin.txt").read_text(encoding="utf-8")
    passages = text.split("---\n")
    rows = [
        Row(f"built-in text, passage {number + 1}", {"text": "\n".join(passages[number:])})
        for number in range(len(passages))
    ]
    return Data("the built-in text", rows)


def _token_ids(row: Row, encode: Encode, max_length: int) -> list[int]:
    if "input_ids" in row.values:
        ids = row.token_ids("input_ids")[:max_length]
    else:
        text = row.text(*TEXT_COLUMNS)
        ids = encode(text)[:max_length] if text.strip() else []
    if not ids:
        raise UsageError(f"{row.where}: the row is empty", hint="remove it, or give it text.")
    return ids
