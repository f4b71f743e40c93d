"""Prompts from files: one per line, or one JSON object per line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phireg.data.rows import Row, parse_object, text_lines
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.generation.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, or its token ids."""

    where: str  # its file and line or option, for messages
    text: str | None
    ids: tuple[int, ...] = ()  # empty until ``encode`` makes them from the text

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
    """Read the prompts of a file in UTF-8; empty lines are skipped.

    Lines are JSON objects with "prompt" or "input_ids" if the name ends in ``.jsonl`` or the first
    line is such an object, and otherwise prompts themselves.
    """
    lines = text_lines(name, content)
    if not lines:
        raise UsageError(f"{name} holds no prompt", hint="write one into each line.")
    if name.endswith(".jsonl") or _is_record(lines[0][1]):
        return [_prompt(Row(where, parse_object(where, line))) for where, line in lines]
    return [Prompt(where, line) for where, line in lines]


def _is_record(line: str) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and ("prompt" in value or "input_ids" in value)


def _prompt(row: Row) -> Prompt:
    if ("prompt" in row.values) == ("input_ids" in row.values):
        raise UsageError(f'{row.where}: not an object with either "prompt" or "input_ids"')
    if "prompt" in row.values:
        return Prompt(row.where, row.text("prompt"))
    return Prompt(row.where, None, tuple(row.token_ids("input_ids")))
