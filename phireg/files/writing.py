"""Single files: written atomically, or copied."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from phireg.errors import OutputError
from phireg.files.regular import open_file

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than the file system or the process limit (ulimit -f) allows",
    errno.EIO: "the disk reports an input/output error",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}
"""Why writing fails for reasons outside phireg, by error number."""


def reason(error: OSError) -> str:
    """Return why an operation failed and, where the error says it, on which file."""
    text = REASONS.get(error.errno or 0) or error.strerror or str(error)
    return text if error.filename is None else f"{text} ({error.filename})"


def check_writable(path: Path, what: str) -> None:
    """Refuse a file that could not be written later; ``what`` names its purpose."""
    if path.is_dir():
        raise OutputError(f"{what} {path} is a directory", hint="give the name of a file.")
    nearest = path.absolute().parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(
            f"{what} {path} cannot be written: no permission, or no directory",
            hint="give a place where you may write.",
        )


def write_file(path: Path, content: bytes, what: str) -> None:
    """Write or replace a file, which appears complete or not at all, and create its directory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)  # as any file; mkstemp's are for the owner alone
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: {what} cannot be written: {reason(error)}") from error


def copy_file(file: Path, directory: Path) -> Path:
    """Copy a file's content into an output directory and return the copy.

    An OSError says that the copy cannot be written; ``OutputDirectory`` explains it.
    """
    copy = directory / file.name
    with open_file(file) as content, copy.open("wb") as out:
        shutil.copyfileobj(content, out)
    return copy
