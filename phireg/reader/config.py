"""Checked access to a checkpoint's config.json: a key of a wrong type is an error with its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phireg.errors import CheckError
from phireg.ranges import largest


class Config:
    """The keys of a JSON object, which errors call ``where``."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def error(self, problem: str, hint: str | None = None) -> CheckError:
        """Return the error to raise about this object."""
        return CheckError(f"{self.where}: {problem}", hint=hint)

    def has(self, key: str) -> bool:
        """Return whether a key is there and not null."""
        return self.values.get(key) is not None

    def get(self, key: str, *older: str, default: Any = None) -> Any:
        """Return the value of a key or of its older name; it is required without a default."""
        for name in (key, *older):
            if self.has(name):
                return self.values[name]
        if default is not None:
            return default
        names = f" (or {', '.join(older)})" if older else ""
        raise self.error(f"the key {key}{names} is missing")

    def block(self, name: str) -> Config:
        """Return the object under a key; an absent one is empty."""
        block = self.values.get(name)
        if block is not None and not isinstance(block, Mapping):
            raise self.error(f"{name} is {block!r}, not an object")
        return Config(block or {}, f"{self.where}: {name}")

    def integer(self, key: str, *older: str, default: int | None = None) -> int:
        """Return a whole number from 1 to its largest value; ``default`` where it is absent."""
        value = self.get(key, *older, default=default)
        if type(value) is not int or not 1 <= value <= largest(key):
            raise self.error(f"{key} is {value!r}, not a whole number from 1 to {largest(key)}")
        return value

    def text(self, key: str) -> str:
        """Return a text."""
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(f"{key} is {value!r}, not a text")
        return value

    def number(self, key: str, *older: str, default: float | None = None) -> float:
        """Return a number."""
        value = self.get(key, *older, default=default)
        if type(value) not in (int, float):
            raise self.error(f"{key} is {value!r}, not a number")
        return float(value)

    def positive(self, key: str, *older: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        value = self.number(key, *older, default=default)
        if not 0 < value < math.inf:
            raise self.error(f"{key} is {value!r}, not a positive number")
        return value

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """Return true or false."""
        value = self.get(key, default=default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, not true or false")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """Return a list of ``length`` positive numbers."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(
                f"{key} is not a list of {length} numbers (half the rotary dimensions)"
            )
        if not all(type(x) in (int, float) and x > 0 for x in value):
            raise self.error(f"{key} holds something that is not a positive number")
        return tuple(float(x) for x in value)
