"""One record of data, and what it holds for a model: token ids, a text or a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from phireg.errors import UsageError


class PaddedIds(tuple[int, ...]):
    """Token ids among which there may be padding."""


Message: TypeAlias = dict[str, str]
"""``role`` ("system", "user" or "assistant") and ``content``."""

Content: TypeAlias = "tuple[int, ...] | str | list[Message]"
"""Token ids (which may be ``PaddedIds``), a text, or a conversation."""

INPUT_IDS = "input_ids"
_TEXTS = ("article", "prompt")
_ANSWERS = ("completion", "response")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
KINDS = (INPUT_IDS, "text", "messages", "conversations", "instruction", *_TEXTS)
"""The columns by which a row is known, in order of preference."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record."""

    where: str  # file and line (a parquet file: row, counted from 1), for messages
    values: Mapping[str, Any]  # by column or key; of CSV and text files every value is text

    def text(self, *names: str) -> str:
        """Return the text of the first of these columns with a value; UsageError without one."""
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        if name in self.values:
            return self._text(f"'{name}'", self.values[name])
        missing = f"there is no {' or '.join(map(repr, dict.fromkeys(names)))}"
        # What stands in the place of names in another kind of file is not shown.
        columns = [name for name in map(str, self.values) if re.fullmatch(r"\w{1,40}", name)][:20]
        others = len(self.values) - len(columns)
        shown = ", ".join(columns) or "no column with a plain name"
        more = f" and {others} more" if columns and others else ""
        raise self._error(missing, f"the row has: {shown}{more}.")

    def token_ids(self, name: str) -> list[int]:
        """Return a column's list of token ids; raise UsageError for anything else."""
        value = self.values[name]
        if value is None:
            raise self._error(f"'{name}' is null", "remove the row, or give it token ids.")
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise self._error(f"'{name}' is no list of token ids")
        ids = list(value)
        for number in ids:
            if not isinstance(number, int) or isinstance(number, bool):
                raise self._error(f"'{name}' has {repr(number)[:60]}, which is no token id")
        if not ids:
            raise self._error("the row is empty", "remove it, or give it text.")
        return ids

    def content(self) -> Content:
        """Return what the row holds for a model; raise UsageError if it holds nothing known.

        ``input_ids`` are taken as they are, a ``text`` or ``article`` too. ``messages``,
        ``conversations`` (ShareGPT), ``instruction`` with ``input`` and ``output`` (Alpaca), and
        ``prompt`` with ``completion`` or ``response`` are conversations. A ``prompt`` alone is a
        text.
        """
        known = [name for name in KINDS if self.values.get(name) is not None]
        kind = known[0] if known else next((name for name in KINDS if name in self.values), "text")
        answer = next((name for name in _ANSWERS if name in self.values), None)
        if kind == INPUT_IDS and kind in self.values:
            ids = self.token_ids(kind)
            return PaddedIds(ids) if isinstance(self.values[kind], PaddedIds) else tuple(ids)
        if kind in ("messages", "conversations"):
            return self._conversation(kind)
        if kind == "instruction":
            question = self._text(f"'{kind}'", self.values[kind])
            if self.values.get("input") not in (None, ""):
                question += "\n\n" + self._text("'input'", self.values["input"])
            return [_message("user", question), *self._answer("output")]
        if kind == "prompt" and (answer or isinstance(self.values[kind], list)):
            value = self.values[kind]
            begun = (
                self._conversation(kind)
                if isinstance(value, list)
                else [_message("user", self._text(f"'{kind}'", value))]
            )
            return [*begun, *(self._answer(answer) if answer else [])]
        return self.text(kind, *KINDS[1:])

    def _conversation(self, name: str) -> list[Message]:
        value = self.values[name]
        if not isinstance(value, list) or not value:
            raise self._error(f"'{name}' is no list of messages")
        messages = []
        for number, item in enumerate(value, 1):
            what = f"message {number} of '{name}'"
            if not isinstance(item, Mapping):
                raise self._error(f"{what} is no object")
            role = self._text(f"the role of {what}", item.get("role", item.get("from")))
            text = self._text(f"the text of {what}", item.get("content", item.get("value")))
            messages.append(_message(_ROLES.get(role, role), text))
        return messages

    def _answer(self, name: str) -> list[Message]:
        if name not in self.values:
            return []
        if isinstance(self.values[name], list):
            return self._conversation(name)
        return [_message("assistant", self._text(f"'{name}'", self.values[name]))]

    def _text(self, what: str, value: Any) -> str:
        if value is None:
            raise self._error(f"{what} is null", "remove the row, or give it a text.")
        if not isinstance(value, str):
            raise self._error(f"{what} is not text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self._error(f"{what} is not valid Unicode text") from None
        return value

    def _error(self, problem: str, hint: str | None = None) -> UsageError:
        return UsageError(f"{self.where}: {problem}", hint=hint)


def unknown_id(ids: Iterable[int], vocab_size: int) -> str | None:
    """Return the first token id that a vocabulary does not have, as text."""
    unknown = next((token for token in ids if not 0 <= token < vocab_size), None)
    if unknown is None:
        return None
    return str(unknown) if abs(unknown) < 10**18 else "of many digits"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
