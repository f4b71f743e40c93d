"""Files that options name and that are written at the end, looked at before anybody waits."""

from __future__ import annotations

from pathlib import Path

from phireg.errors import UsageError


def check_file(path: Path, option: str) -> Path:
    """Refuse a file that could not be written later; a typo in a path makes no directory.

    Args:
        path: the file.
        option: that names it, for the message.

    Returns:
        The path.

    Raises:
        UsageError: its directory does not exist.
        OutputError: it is a directory, or there is no permission.
    """
    from phireg.calibration.calibrate import check_writable

    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"{option} {path}: no such directory: {path.parent}",
            hint=f"make it first, or give {option} another place.",
        )
    check_writable(path, option)
    return path
