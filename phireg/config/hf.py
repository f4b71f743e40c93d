"""A Hugging Face config.json as plain data that remembers what was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class HFConfig:
    """A parsed config.json.

    Keys may be dotted to reach into a block (``rope_parameters.rope_theta``). A JSON null counts as
    absent, since transformers writes both for "not set" (:meth:`is_null` tells them apart). Every
    key looked at is remembered, so that what nobody read can be reported (:meth:`unread`).

    Args:
        data: the JSON object.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """The value of a dotted key, or None if it is absent or null."""
        self._read.add(key)
        value: Any = self._data
        for name in key.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(name)
        return value

    def has(self, key: str) -> bool:
        """Whether a dotted key is present and not null."""
        return self.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether a top-level key is present with the value null."""
        return self.get(key) is None and key in self._data

    @property
    def architectures(self) -> tuple[str, ...]:
        """Model classes named by the config; empty when it names none."""
        names = self.get("architectures")
        return tuple(str(name) for name in names) if isinstance(names, list) else ()

    @property
    def model_type(self) -> str:
        """The ``model_type``, or an empty string."""
        return str(self.get("model_type") or "")

    def unread(self) -> tuple[str, ...]:
        """Dotted keys with a value that nobody asked for, in file order.

        A block counts leaf by leaf, unless it was read as a whole.
        """
        return tuple(key for key in _leaves(self._data, "") if not self._was_read(key))

    def _was_read(self, key: str) -> bool:
        names = key.split(".")
        return any(".".join(names[: n + 1]) in self._read for n in range(len(names)))


def _leaves(block: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}"
