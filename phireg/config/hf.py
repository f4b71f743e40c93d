"""A Hugging Face config.json as plain data that remembers which keys were read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class HFConfig:
    """A parsed config.json.

    Keys may be dotted to reach into a block (``rope_parameters.rope_theta``). A JSON null counts as
    absent, since transformers writes both for "not set" (:meth:`is_null` tells them apart). Every
    key that is read is remembered, so that the others can be reported (:meth:`unread`).

    Args:
        data: the JSON object.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        # phireg itself reads these for every family (Family.refusal).
        self._read = {"architectures", "model_type"}

    def plain(self) -> dict[str, Any]:
        """Return all keys and values, none of which counts as read."""
        return dict(self._data)

    def fresh(self) -> HFConfig:
        """Return the same config with nothing read yet."""
        return HFConfig(self._data)

    def having(self, key: str, value: Any) -> HFConfig:
        """Return the same config, nothing read yet, with another value of a top-level key."""
        return HFConfig({**self._data, key: value})

    def get(self, key: str) -> Any:
        """Return the value of a dotted key, or None if it is absent or null."""
        self._read.add(key)
        return self._value(key)

    def has(self, key: str) -> bool:
        """Return whether a dotted key is present and not null.

        Asking for a block does not count as reading what is in it.
        """
        value = self._value(key)
        if not isinstance(value, Mapping):
            self._read.add(key)
        return value is not None

    def looked_into(self, key: str) -> bool:
        """Return whether a key inside the block ``key`` was read."""
        return any(read.startswith(f"{key}.") for read in self._read)

    def is_null(self, key: str) -> bool:
        """Return whether a top-level key is present with the value null."""
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
        """Return the dotted keys with a value that were not read, in file order.

        A block of which some key was read counts leaf by leaf, any other as one key.
        """
        return tuple(self._unread(self._data, ""))

    def _unread(self, block: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, value in block.items():
            key = f"{prefix}{name}"
            if value is None or key in self._read:
                continue
            if isinstance(value, Mapping) and self.looked_into(key):
                yield from self._unread(value, f"{key}.")
            else:
                yield key

    def _value(self, key: str) -> Any:
        value: Any = self._data
        for name in key.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(name)
        return value
