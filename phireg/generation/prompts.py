"""Prompts from files: one per line, or one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phireg.data.rows import Row, parse_object, text_lines
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.generation.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, or its token ids.

    Attributes:
        where: its file and line or option, for messages.
        text: the text; None if only ids were given.
        ids: the token ids; empty until ``encode`` makes them from the text.
    """

    where: str
    text: str | None
    ids: tuple[int, ...] = ()

    def encode(self, tokenizer: Tokenizer | None) -> Prompt:
        """Return the prompt with its token ids; raise UsageError if it is empty."""
        if self.ids:
            return self
        if tokenizer is None:
            raise UsageError(
                "the checkpoint carries no tokenizer",
                hint="give --tokenizer-dir the directory of the source model, or --input-file a "
                'file with {"input_ids": [...]} in each line.',
            )
        ids = tokenizer.encode(Row(self.where, {"prompt": self.text}).text("prompt"))
        if not ids:
            raise UsageError(f"{self.where}: the prompt is empty", hint="give it some text.")
        return replace(self, ids=tuple(ids))


def read_prompts(name: str, content: bytes) -> list[Prompt]:
    """Read the prompts of a file; empty lines are skipped.

    Args:
        name: its name, for messages; with ``.jsonl`` at its end every line is JSON.
        content: UTF-8 text. Lines are JSON objects with "prompt" or "input_ids" if the first one
            is, and otherwise prompts themselves.

    Raises:
        UsageError: it is not UTF-8, holds no prompt, or has a malformed line.
    """
    lines = text_lines(name, content)
    if not lines:
        raise UsageError(f"{name} holds no prompt", hint="write one into each line.")
    if name.endswith(".jsonl") or _is_record(lines[0][1]):
        return list(_records(lines))
    return [Prompt(where, line) for where, line in lines]


def _is_record(line: str) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and ("prompt" in value or "input_ids" in value)


def _records(lines: Iterable[tuple[str, str]]) -> Iterator[Prompt]:
    for where, line in lines:
        row = Row(where, parse_object(where, line))
        if ("prompt" in row.values) == ("input_ids" in row.values):
            raise UsageError(f'{where}: not an object with either "prompt" or "input_ids"')
        if "prompt" in row.values:
            yield Prompt(where, row.text("prompt"))
        else:
            yield Prompt(where, None, tuple(row.token_ids("input_ids")))
