"""Logits that are no numbers: a token of them, or a verdict on them, is an error with a place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from phireg.errors import CheckError

_RANGE = (
    "hidden states may outgrow float16's 65,504: --dtype bfloat16 or float32 holds them (an "
    "engine's dtype is that of phireg convert --dtype). Or "
)
_WEIGHTS = (
    "a weight may be NaN or infinite: phireg convert counts such values, and phireg verify names "
    "the layer; compare the source's files with the published ones."
)

NO_TOKEN = -1
"""Stands for the token of a row whose logits are not finite, until the host looks at it."""


class NotFiniteError(CheckError):
    """The logits of a row are NaN or infinite: no token can be chosen, and nothing measured."""

    def __init__(self, row: int, position: int, dtype: str, name: str | None = None) -> None:
        self.row, self.position, self.dtype = row, position, dtype
        super().__init__(
            f"{name or f'row {row}'}: the logits of the token at position {position} are not "
            f"finite, computed in {dtype}",
            hint=(_RANGE if dtype == "float16" else "") + _WEIGHTS,
        )

    def named(self, name: str) -> NotFiniteError:
        """Return the same error with a name in place of the row's number."""
        return NotFiniteError(self.row, self.position, self.dtype, name)


@contextmanager
def rows_named(names: Sequence[str]) -> Iterator[None]:
    """Name the row of a NotFiniteError that comes from inside."""
    try:
        yield
    except NotFiniteError as error:
        raise error.named(names[error.row]) from None


def finite(logits: Tensor) -> Tensor:
    """Return for each row whether its largest logit is a number; minus infinity is suppressed."""
    return logits.amax(dim=-1).isfinite()


def check_logits(logits: Tensor, row: int, first: int, dtype: str) -> None:
    """Refuse logits [positions, vocabulary], the first at position ``first`` of a row."""
    wrong = ~finite(logits)
    if bool(wrong.any()):
        raise NotFiniteError(row, first + int(wrong.nonzero()[0]), dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name without its prefix."""
    return str(dtype).removeprefix("torch.")
