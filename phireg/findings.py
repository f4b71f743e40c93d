"""Findings of a plan, which are collected and never raised one by one, and the places they name."""

from __future__ import annotations

import enum
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from phireg.errors import shortened

MOST_FINDINGS = 1000

UNMEASURED, MEASURED = "unmeasured", "measured"
"""Codes of doubts that a measurement of the finished checkpoint settles, before and after it."""


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "subject", shortened(self.subject, 200))
        object.__setattr__(self, "detail", shortened(self.detail))


def limited(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Keep the first findings of each kind, and count the others."""
    counts: Counter[tuple[Severity, str]] = Counter()
    kept = []
    for finding in findings:
        kind = finding.severity, finding.code
        counts[kind] += 1
        if counts[kind] <= MOST_FINDINGS:
            kept.append(finding)
    more = {kind: count - MOST_FINDINGS for kind, count in counts.items() if count > MOST_FINDINGS}
    return (
        *kept,
        *(Finding(*kind, "", f"{count} more of this kind") for kind, count in more.items()),
    )


def first(texts: Sequence[str], most: int) -> list[str]:
    """Keep the first texts, and count the others."""
    more = len(texts) - most
    return [*texts[:most], f"... and {more} more"] if more > 0 else [*texts]


def source_line(filename: str, line: int) -> str:
    """Format a place in a plugin as ``folder/file.py:line``."""
    path = Path(filename)
    return f"{path.parent.name}/{path.name}:{line}"


def calling_line(package: Path) -> str:
    """Return the place that called into the package in this folder, or its modules' own code."""
    inside = f"{package}{os.sep}"
    frame = sys._getframe(1)
    while (
        frame.f_back is not None
        and frame.f_code.co_filename.startswith(inside)
        and frame.f_code.co_name != "<module>"
    ):
        frame = frame.f_back
    return source_line(frame.f_code.co_filename, frame.f_lineno)
