"""Single files: written atomically, or copied."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, NamedTuple

from phireg.errors import OutputError
from phireg.files.regular import open_file

PARTIAL_SUFFIX = ".phireg-partial"
"""Of the names of what is not finished."""

_HEAD = 2**16

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


class SingleFile(NamedTuple):
    """A kind of file that phireg writes outside its directories; only such files are replaced."""

    name: str  # for messages, with its article
    mark: bytes  # among the first bytes of every one


REPORT = SingleFile("the report", b'<meta name="generator" content="phireg">')
STATISTICS = SingleFile("the calibration statistics", b"phireg-calibration-")
BUILD_RECORD = SingleFile("the engine's manifest", b'"name": "phireg"')
LOG = SingleFile("the builder's log", b"# written by phireg build\n")


def check_writable(path: Path, kind: SingleFile) -> None:
    """Refuse a file that could not be written later, or is not phireg's to replace."""
    if path.is_dir():
        raise OutputError(f"{kind.name} {path} is a directory", hint="give the name of a file.")
    nearest = path.absolute().parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(
            f"{kind.name} {path} cannot be written: no permission, or no directory",
            hint="give a place where you may write.",
        )
    _check_replaceable(path, kind)


def _check_replaceable(path: Path, kind: SingleFile) -> None:
    """Refuse what exists, unless it is empty or an earlier file of this kind."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            with _opened(path) as file:
                head = file.read(_HEAD)
            if not head or kind.mark in head:
                return
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: {kind.name} cannot be written: {reason(error)}") from None
    actual = "a link" if stat.S_ISLNK(mode) else "not one that phireg wrote"
    raise OutputError(
        f"{kind.name} {path} exists, and is {actual}",
        hint="name a file that does not exist, or move this one away.",
    )


def _opened(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def write_file(path: Path, content: bytes, kind: SingleFile) -> None:
    """Write a file, which appears complete or not at all, and create its directory.

    What is written takes the name at the end, so a link is replaced and never followed. What a
    killed run left beside it is removed: the lock of its unfinished file is free.
    """
    _check_replaceable(path, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        try:
            with unfinished.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: {kind.name} cannot be written: {reason(error)}") from error


def _remove_unfinished(path: Path) -> None:
    for remains in path.parent.glob(f".{escape(path.name)}.*{PARTIAL_SUFFIX}"):
        with suppress(OSError), _opened(remains) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_uid == os.geteuid():
                remains.unlink()


@contextmanager
def new_log(path: Path) -> Iterator[IO[bytes]]:
    """Open a new log, in the place of an earlier one."""
    _check_replaceable(path, LOG)
    try:
        path.unlink(missing_ok=True)
        log = path.open("xb", buffering=0)
    except OSError as error:
        raise OutputError(f"{path}: {LOG.name} cannot be written: {reason(error)}") from error
    with log:
        log.write(LOG.mark)
        yield log


def copy_file(file: Path, directory: Path) -> Path:
    """Copy a file's content into an output directory; an OSError is about the copy."""
    copy = directory / file.name
    with open_file(file) as content, copy.open("wb") as out:
        shutil.copyfileobj(content, out)
    return copy
