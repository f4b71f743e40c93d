"""Bounds on a pickle before it is loaded: its size, what it asks for, and the work it makes.

torch's restricted unpickler runs no code of a file. But it calls constructors that take a size,
and a few bytes that refer to each other can describe a key with more parts than there are atoms.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any

MOST_BYTES = 4 * 2**20
"""Twenty thousand tensors."""

_MOST_PARTS = 20_000_000
_PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.serialization _get_layout|torch\.nn\.parameter Parameter|torch (Size|device)"
    r"|torch(\.storage)? \w+Storage|torch [a-z]\w*"
)
"""What a state dict of tensors is made with; none of it takes a size that memory is needed for."""


class TooMuch(ValueError):  # noqa: N818 - said in a sentence
    """The pickle is out of proportion; the text says how."""


class Asks(ValueError):  # noqa: N818 - as above
    """The pickle asks for something that no state dict needs; the text is its name."""


def check_pickle(raw: bytes) -> None:
    """Raise TooMuch, Asks, or another ValueError for bytes that are no pickle."""
    if len(raw) > MOST_BYTES:
        raise TooMuch(f"the list of its tensors has {len(raw)} bytes, more than {MOST_BYTES}")
    stack: list[Any] = []  # the number of parts of each object, and marks
    memo: dict[int, int] = {}
    work = 0
    value: Any
    for opcode, value, _ in pickletools.genops(raw):
        if opcode.name == "GLOBAL" and not _PLAIN.fullmatch(value):
            raise Asks(value.replace(" ", "."))
        before, after = opcode.stack_before, opcode.stack_after
        parts = 0
        if pickletools.markobject in before:
            while (item := _popped(stack)) is not None:
                parts += item
            before = before[: before.index(pickletools.markobject)]
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1] if stack else 0
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(value, 0))
        else:
            parts += sum(_popped(stack) or 0 for _ in before)
            marks = pickletools.markobject in after
            stack += [None] if marks else [parts + 1] * len(after)
        work += parts
        if work > _MOST_PARTS:
            raise TooMuch("its objects refer to each other beyond all bounds")


def _popped(stack: list[Any]) -> int | None:
    """Take the top of the stack; None for a mark, and below the last object."""
    return stack.pop() if stack else None
