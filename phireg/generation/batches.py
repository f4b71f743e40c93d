"""Batches of prompts whose rows get the same text side by side as alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

from phireg.errors import PhiregWarning
from phireg.generation.backend import Description, LongRope

_SHORT, _LONG, _CROSSING = range(3)


def batches(
    model: Description, lengths: Sequence[int], size: int, new_tokens: int
) -> Iterator[slice]:
    """Cut prompts of these lengths into batches of up to ``size``, in order.

    Where a backend chooses long rope's factors by the longest row, a batch has prompts of one side
    of the switch only, and one that may pass it while it continues is alone.
    """
    rope = model.long_rope
    sides = [_side(rope, length, new_tokens) for length in lengths]
    start = 0
    for index in range(1, len(sides) + 1):
        if (
            index == len(sides)
            or index - start == size
            or sides[index] != sides[index - 1]
            or sides[index] == _CROSSING
        ):
            yield slice(start, index)
            start = index


def _side(rope: LongRope | None, length: int, new_tokens: int) -> int:
    if rope is None or rope.by_row:
        return _SHORT
    if length > rope.switch:
        return _LONG
    return _CROSSING if _crosses(rope, length, new_tokens) else _SHORT


def _crosses(rope: LongRope, length: int, new_tokens: int) -> bool:
    """Return whether a token is computed above the switch; the last new one is not computed on."""
    return length <= rope.switch < length + new_tokens - 1


def warn_of_switch(model: Description, lengths: Iterable[int], new: Iterable[int]) -> None:
    """Say once that a text of so many tokens passed long rope's switch with its new tokens."""
    rope = model.long_rope
    if rope and any(_crosses(rope, *row) for row in zip(lengths, new, strict=True)):
        warnings.warn(
            f"a text passes {rope.switch:,} tokens, where long rope takes the long factors: "
            f"{rope.crossing}",
            PhiregWarning,
            stacklevel=1,
        )
