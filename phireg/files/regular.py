"""The one opener of files that others may have made, and reading at an offset.

``tests/test_import_rules.py`` keeps the other modules from opening files themselves.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from phireg.errors import SourceError, UsageError


class Limit(enum.IntEnum):
    """The largest size in bytes of a file that is read whole, by its kind."""

    JSON = 64 * 2**20
    """Configs, indices, manifests."""
    TOKENIZER = 128 * 2**20
    """The files that travel with the weights."""
    STATISTICS = 256 * 2**20
    ROWS = 2**30
    """Prompts, articles and calibration texts."""


ANYWHERE = Path("/")
"""For ``inside``: the user named this very file, so it may link to any place."""

_PUT = "put the file itself in its place"


class Stamp(NamedTuple):
    """The state of a file: size in bytes, modification time in ns."""

    size: int
    mtime_ns: int


def stamp_of(fd: int) -> Stamp:
    """Return the stamp of an open file."""
    status = os.fstat(fd)
    return Stamp(status.st_size, status.st_mtime_ns)


def open_regular(path: Path, *, inside: Path | None = None, limit: int | None = None) -> int:
    """Open a regular file for reading and return its descriptor; raise SourceError.

    Symbolic links are followed if they lead to a file in the directory ``inside`` (default: that
    of the file), or to a blob of a Hugging Face cache.
    """
    try:
        real = Path(os.path.realpath(path))
        root = Path(os.path.realpath(inside or path.parent))
        if not real.is_relative_to(root) and not _is_blob(real, root):
            raise SourceError(
                f"{path}: a symbolic link to {real}, which is outside of {inside or path.parent}",
                hint=_PUT,
            )
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        if path.is_symlink():
            raise SourceError(
                f"{path}: a symbolic link to a file that is not there",
                hint="download the model again: the cache it points into is incomplete",
            ) from None
        raise SourceError(
            f"{path}: no such file", hint=f"give a directory that holds {path.name}."
        ) from None
    except ValueError:  # a NUL in the name
        raise SourceError(f"{str(path)!r}: not a possible file name") from None
    except OSError as error:
        hint = "check the permissions of the file and its directories"
        raise SourceError(
            f"{path}: cannot be opened: {error.strerror}",
            hint=hint if isinstance(error, PermissionError) else None,
        ) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        actual = "a directory" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise SourceError(f"{path}: expected a file, this is {actual}", hint=_PUT)
    if limit is not None and status.st_size > limit:
        os.close(fd)
        raise SourceError(
            f"{path}: {status.st_size} bytes, more than the {limit} accepted of such a file",
            hint="compare the file with the one that was published",
        )
    return fd


def _is_blob(real: Path, root: Path) -> bool:
    """Return whether a path is ``blobs/HASH`` of a cache, and ``root`` its snapshot or a copy."""
    repository = real.parent.parent
    own = repository / "snapshots" == root.parent or repository.name.startswith("models--")
    return real.parent.name == "blobs" and own


def open_file(path: Path, *, inside: Path | None = None) -> BinaryIO:
    """Open a file as :func:`open_regular` does, as a file object."""
    return os.fdopen(open_regular(path, inside=inside), "rb")


def read_file(path: Path, limit: int, *, inside: Path | None = None) -> bytes:
    """Read a whole file of at most ``limit`` bytes."""
    fd = open_regular(path, inside=inside, limit=limit)
    try:
        return read_bytes(fd, path, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def read_named(path: Path) -> bytes:
    """Read a whole file that the user named; raise UsageError if that is impossible."""
    try:
        return read_file(path, Limit.ROWS, inside=ANYWHERE)
    except SourceError as error:
        is_missing = isinstance(error.__context__, FileNotFoundError) and not path.is_symlink()
        hint = "give a file that is there" if is_missing else error.hint
        raise UsageError(error.message, hint=hint) from None


def read_into(fd: int, path: Path, offset: int, view: memoryview) -> None:
    """Fill a writable byte view from a file at an absolute offset; ``path`` is for messages."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except (OSError, OverflowError) as error:  # an offset beyond what the system can express
            raise SourceError(
                f"{path}: reading at byte {offset + done} failed: {error}",
                hint="check the disk; else make or download the file again",
            ) from error
        if count == 0:
            raise SourceError(
                f"{path}: the file ends at byte {offset + done}, "
                f"{len(view) - done} bytes too early",
                hint="the file is damaged or incomplete; make or download it again",
            )
        done += count


def read_bytes(fd: int, path: Path, offset: int, count: int) -> bytes:
    """Read exactly ``count`` bytes at an absolute offset."""
    buffer = bytearray(count)
    read_into(fd, path, offset, memoryview(buffer))
    return bytes(buffer)


def check_unchanged(fd: int, path: Path, stamp: Stamp) -> None:
    """Refuse a file that changed since it had ``stamp``."""
    if stamp_of(fd) != stamp:
        raise SourceError(
            f"{path}: the file changed while it was being used",
            hint="wait until the download or copy is complete, then start again",
        )


def disguise(head: bytes) -> tuple[str, str] | None:
    """Return what a file really is, and a hint, where its first 64 bytes are a known mix-up."""
    text = head.lstrip()[:64].lower()
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself", "fetch the contents with: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "an HTML or XML page, not the file itself",
            "the download failed or needs a login; download the file again",
        )
    if head.startswith(b"PK\x03\x04"):
        return (
            "a zip archive (perhaps a PyTorch file under another name)",
            "rename or re-save it in the format its name promises",
        )
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            "a Python pickle (perhaps an old PyTorch file under another name)",
            "load it where you trust it and save it with safetensors.torch.save_file",
        )
    if head.startswith(b"GGUF"):
        return "a GGUF file", "give the original Hugging Face checkpoint instead"
    return None


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Join the first names of a list for a message: ``'a', 'b' and 7 more``."""
    shown = ", ".join(repr(name[:200]) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def bullets(defects: list[str], limit: int = 5) -> str:
    """List defects one per line; past ``limit`` they are only counted."""
    lines = [f"\n  - {defect}" for defect in defects[:limit]]
    if len(defects) > limit:
        lines.append(f"\n  ... and {len(defects) - limit} more")
    return "".join(lines)
