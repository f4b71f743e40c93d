"""What a plan has to say about its input: collected, never raised one by one."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.Enum):
    """How much a finding matters."""

    ERROR = "error"
    """The conversion is refused."""
    WARNING = "warning"
    """The result is what was asked for, but somebody should know."""
    NOTE = "note"
    """Worth telling; nothing to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation.

    Attributes:
        severity: whether the conversion may go on.
        code: one word for the kind (``missing``, ``unmapped``, ``shape``, ``sharding``, ...).
        subject: the tensor, module or config key it is about.
        detail: what is the matter, and what to do where that is known.
        where: file and line of the rule concerned, if any.
    """

    severity: Severity
    code: str
    subject: str
    detail: str
    where: str = ""
