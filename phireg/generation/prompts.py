"""Prompts from files: token ids, texts and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from phireg.data.formats import FORMATS, OTHER_KINDS, json_rows, text_lines, unknown_kind
from phireg.data.row import INPUT_IDS, KINDS, Content, PaddedIds, Row
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.generation.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, its token ids, or a conversation."""

    where: str  # its file and line or option, for messages
    text: str | None  # None if ids are given; of a conversation, what the template makes of it
    ids: tuple[int, ...] = ()  # empty until ``encode_prompts`` makes them
    content: Content | None = None  # of a row; None if it is the text, or the ids


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer | None, most: int
) -> list[Prompt]:
    """Return the prompts with ``most`` token ids at most; UsageError where that is impossible."""
    open_ones = [prompt for prompt in prompts if not prompt.ids]
    if open_ones and tokenizer is None:
        padded = any(isinstance(prompt.content, PaddedIds) for prompt in open_ones)
        raise UsageError(
            "the checkpoint carries no tokenizer"
            + (", and only one tells which ids of an .npy file are padding" if padded else ""),
            hint="give --tokenizer-dir the directory of the source model, or --input-file a "
            'file with {"input_ids": [...]} in each line.',
        )
    encoded = iter(
        tokenizer.encode_contents(
            [prompt.where for prompt in open_ones],
            [_content(prompt) for prompt in open_ones],
            most,
            answer=True,
        )
        if tokenizer
        else ()
    )
    result = []
    for prompt in prompts:
        if not prompt.ids:
            text, ids = next(encoded)
            if not ids:
                raise UsageError(f"{prompt.where}: the prompt is empty", hint="give it some text.")
            prompt = replace(prompt, text=text, ids=tuple(ids))
        result.append(prompt)
    return result


def _content(prompt: Prompt) -> Content:
    """Return what is continued: of a conversation, all up to the model's last answer."""
    if prompt.content is None:
        return Row(prompt.where, {"prompt": prompt.text}).text("prompt")
    content = prompt.content
    while isinstance(content, list) and content[-1]["role"] == "assistant":
        content = content[:-1]
        if not content:
            raise UsageError(f"{prompt.where}: there is nothing to answer in the conversation")
    return content


def read_prompts(name: str, content: bytes) -> list[Prompt]:
    """Read the prompts of a file; empty lines are skipped.

    The suffix of the name tells the format, as of ``data.formats.read_rows``. Lines of .txt and of
    other files are prompts themselves, unless the first one is a JSON object that holds a prompt.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix in OTHER_KINDS:
        raise unknown_kind(name)
    reader = FORMATS.get(suffix)
    if reader is FORMATS[".txt"] or reader is None:
        lines = list(text_lines(name, content))
        if not (lines and _is_record(lines[0])):
            prompts = [Prompt(where, line) for where, line in lines]
            return _some(name, prompts)
        reader = json_rows
    return _some(name, [_prompt(row) for row in reader(name, content)])


def _some(name: str, prompts: list[Prompt]) -> list[Prompt]:
    if not prompts:
        raise UsageError(f"{name} holds no prompt", hint="write one into each line.")
    return prompts


def _is_record(line: tuple[str, str]) -> bool:
    try:
        (row,) = json_rows(line[0], line[1].encode())
    except UsageError:
        return False
    return not row.values.keys().isdisjoint(KINDS)


def _prompt(row: Row) -> Prompt:
    if INPUT_IDS in row.values and "prompt" in row.values:
        raise UsageError(f'{row.where}: an object with both "prompt" and "input_ids"')
    content = row.content()
    if isinstance(content, str):
        return Prompt(row.where, content)
    if type(content) is tuple:
        return Prompt(row.where, None, content)
    return Prompt(row.where, None, content=content)
