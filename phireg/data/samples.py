"""Calibration samples: rows of token ids, unpadded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import xxhash

from phireg.data.row import Content, Row, unknown_id
from phireg.data.rows import Data, load_rows
from phireg.errors import UsageError

BUILTIN = "builtin"
DEFAULT_SIZE = 512  # samples, as TensorRT-LLM's quantization scripts take
Encode = Callable[[Sequence[str], Sequence[Content], int], list[list[int]]]
"""Takes names for messages, contents, and the most tokens of each; returns token ids, with the
special tokens that the tokenizer adds."""


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
    source: str,
    encode: Encode,
    *,
    size: int | None,
    max_length: int,
    vocab_size: int,
    most: int = DEFAULT_SIZE,
) -> Samples:
    """Read the first samples of the data, in order.

    A row holds what ``Row.content`` says. The built-in text has one sample per passage, which
    begins there and runs on into the following ones.

    The source is as of ``load_rows``: the train split of cnn_dailymail, and "builtin" for the text
    that phireg contains. A size of None is ``most``, or as many as there are.
    """
    count = most if size is None else size
    data = load_rows(source, "train", count, {BUILTIN: _builtin})
    origin = data.name if data.note is None else f"{data.name}, because {data.note}"
    rows, taken = [], data.rows[:count]
    contents = [row.content() for row in taken]
    for row, content in zip(taken, contents, strict=True):
        if isinstance(content, str) and not content.strip():
            raise UsageError(f"{row.where}: the row is empty", hint="remove it, or give it text.")
    encoded = encode([row.where for row in taken], contents, max_length)
    for row, ids in zip(taken, encoded, strict=True):
        if token := unknown_id(ids, vocab_size):
            raise UsageError(
                f"{row.where}: token id {token} is not one of the model's {vocab_size}",
                hint="the ids, or the tokenizer, are of another model.",
            )
        rows.append(tuple(ids))
    if len(rows) < count and size is not None:
        origin += f" (which has {len(rows)} samples, not {count})"
    return Samples(tuple(rows), origin)


def builtin_text() -> str:
    """Return the text that comes with phireg, whose passages are divided by lines of ``---``."""
    return resources.files(__package__).joinpath("builtin.txt").read_text(encoding="utf-8")


def _builtin() -> Data:
    passages = builtin_text().split("---\n")
    rows = [
        Row(f"built-in text, passage {number + 1}", {"text": "\n".join(passages[number:])})
        for number in range(len(passages))
    ]
    return Data("the built-in text", rows)
