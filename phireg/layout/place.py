"""Places in plugins, for messages: a file with its folder, and a line."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def source_line(filename: str, line: int) -> str:
    """Format a place as ``folder/file.py:line``."""
    path = Path(filename)
    return f"{path.parent.name}/{path.name}:{line}"


def caller(package: Path) -> str:
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
