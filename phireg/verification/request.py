"""What is asked of a verification, and how a check answers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from phireg.verification.result import Problem

Progress = Callable[[str, int, int], None]
"""Told (check, how much more is done, how much there is in all); may be called from threads."""

Outcome = tuple[str, list[Problem], list[str]]
"""A check's summary, problems and notes."""


class Skipped(Exception):  # noqa: N818 - nothing is wrong
    """A check cannot be made; the text says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to verify, and how.

    Attributes:
        checkpoint_dir: the checkpoint.
        model_dir: the source it was made from, a directory or a hub repository.
        family: family name, or ``auto``.
        revision: of a hub repository.
        checks: names out of ``result.CHECKS``.
        device: where logits are computed.
        dtype: in which dtype, by name.
        max_tokens: most tokens of a prompt; None for what the budget allows.
    """

    checkpoint_dir: Path
    model_dir: str
    family: str
    revision: str | None
    checks: Collection[str]
    device: str
    dtype: str
    max_tokens: int | None
