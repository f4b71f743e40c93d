"""Checked access to a checkpoint's config.json: a key of a wrong type is an error with its name."""

from __future__ import annotations

import math
from typing import Any

from phireg.errors import CheckError


class Config:
    """The keys of a JSON object.

    Args:
        values: the object.
        where: what to call it in an error.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, problem: str, hint: str | None = None) -> CheckError:
        """The error to raise about this object."""
        return CheckError(f"{self.where}: {problem}", hint=hint)

    def get(self, key: str, *older: str) -> Any:
        """The value of a required key, or of the name an older version gave it."""
        for name in (key, *older):
            if self.values.get(name) is not None:
                return self.values[name]
        spelled = f" (or {', '.join(older)})" if older else ""
        raise self.fail(f"the key {key}{spelled} is missing")

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return self.values.get(key) is not None

    def block(self, name: str) -> Config:
        """The object under a key; an absent one is empty."""
        block = self.values.get(name)
        if block is not None and not isinstance(block, dict):
            raise self.fail(f"{name} is {block!r}, not an object")
        return Config(block or {}, f"{self.where}: {name}")

    def integer(self, key: str, *older: str) -> int:
        """A positive whole number."""
        value = self.get(key, *older)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(f"{key} is {value!r}, not a positive whole number")
        return value

    def number(self, key: str, *older: str) -> float:
        """A number."""
        value = self.get(key, *older)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(f"{key} is {value!r}, not a number")
        return float(value)

    def positive(self, key: str, *older: str) -> float:
        """A finite number above 0."""
        value = self.number(key, *older)
        if not 0 < value < math.inf:
            raise self.fail(f"{key} is {value!r}, not a positive number")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.fail(f"{key} is {value!r}, not true or false")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of so many positive numbers."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length:
            raise self.fail(f"{key} is not a list of {length} numbers (half the rotary dimensions)")
        if not all(type(x) in (int, float) and x > 0 for x in value):
            raise self.fail(f"{key} holds something that is not a positive number")
        return tuple(float(x) for x in value)
