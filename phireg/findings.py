"""Findings of a plan, which are collected and never raised one by one, and the places they name."""

from __future__ import annotations

import enum
import os
import sys
from dataclasses import dataclass
from pathlib import Path


class Severity(enum.Enum):
    """The weight of a finding."""

    ERROR = "error"
    """The conversion is refused."""
    WARNING = "warning"
    """The result is as requested, but may not be what is meant."""
    NOTE = "note"
    """Information; nothing to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation."""

    severity: Severity
    code: str  # one word for the kind: missing, unmapped, shape, sharding, ...
    subject: str  # the tensor, module or config key it is about
    detail: str  # the problem, and what to do where that is known
    where: str = ""  # file and line of the rule concerned, if any


def source_line(filename: str, line: int) -> str:
    """Format a place in a plugin as ``folder/file.py:line``."""
    path = Path(filename)
    return f"{path.parent.name}/{path.name}:{line}"


def calling_line(package: Path) -> str:
    """Return the place of the code that called into the package in this folder.

    Frames inside the package are skipped, except its modules' own top-level code.
    """
    inside = f"{package}{os.sep}"
    frame = sys._getframe(1)
    while (
        frame.f_back is not None
        and frame.f_code.co_filename.startswith(inside)
        and frame.f_code.co_name != "<module>"
    ):
        frame = frame.f_back
    return source_line(frame.f_code.co_filename, frame.f_lineno)
