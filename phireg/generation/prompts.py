"""Prompts from files: one per line, or one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from phireg.errors import UsageError
from phireg.generation.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, or its token ids.

    Attributes:
        where: where it came from, for messages.
        text: the text; None if only ids were given.
        ids: the ids; None if they are to be made from the text.
    """

    where: str
    text: str | None
    ids: tuple[int, ...] | None = None

    def encoded(self, tokenizer: Tokenizer | None) -> list[int]:
        """The token ids.

        Raises:
            UsageError: there are none, or there is no tokenizer to make them with.
        """
        if self.ids is not None:
            return list(self.ids)
        if tokenizer is None:
            raise UsageError(
                "the checkpoint carries no tokenizer",
                hint="give --tokenizer-dir the directory of the source model, or --input-file a "
                'file with {"input_ids": [...]} in each line.',
            )
        text = self.text or ""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{self.where}: the prompt is not valid Unicode text") from None
        ids = tokenizer.encode(text)
        if not ids:
            raise UsageError(f"{self.where}: the prompt is empty", hint="give it some text.")
        return ids


def read_prompts(name: str, content: bytes) -> list[Prompt]:
    """The prompts of a file; empty lines are skipped.

    Args:
        name: its name, for messages; ``.jsonl`` at its end makes every line JSON.
        content: UTF-8 text. Lines are JSON objects with "prompt" or "input_ids" if the first one
            is, and otherwise prompts themselves.

    Raises:
        UsageError: it is not UTF-8, holds no prompt, or has a line that is not what it must be.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{name}:{line}: not UTF-8 text (byte {error.start})", hint="save it as UTF-8."
        ) from None
    lines = [
        (f"{name}:{number}", line.removesuffix("\r"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
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
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: not JSON: {error}") from None
        keys = [key for key in ("prompt", "input_ids") if isinstance(value, dict) and key in value]
        if len(keys) != 1:
            raise UsageError(f'{where}: not an object with either "prompt" or "input_ids"')
        (key,) = keys
        given = value[key]
        if key == "prompt":
            if not isinstance(given, str):
                raise UsageError(f'{where}: "prompt" is not text')
            yield Prompt(where, given)
        else:
            if not (isinstance(given, list) and given and all(type(i) is int for i in given)):
                raise UsageError(f'{where}: "input_ids" is not a list of token ids')
            yield Prompt(where, None, tuple(given))
