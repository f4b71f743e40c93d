"""Where in a plugin something was made, for messages about it."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def caller(package: Path) -> str:
    """File (with its folder) and line of the code that called into a package.

    Args:
        package: folder whose functions are passed over. What its modules make as they are imported
            is their own.
    """
    inside = f"{package}{os.sep}"
    frame = sys._getframe(1)
    while (
        frame.f_back is not None
        and frame.f_code.co_filename.startswith(inside)
        and frame.f_code.co_name != "<module>"
    ):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
