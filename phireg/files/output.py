"""The output directory, which appears under its name complete or not at all.

Beside the target ``NAME`` a run keeps one directory of its own::

    NAME.phireg-partial/
        .phireg-partial     marker with the pid and host, locked (flock) while the run lives
        unfinished/         what is being written; renamed to NAME when complete
        replaced/           with overwrite: the former NAME, between the two renames

The marker is the first thing created and the last thing removed, so whatever a killed run leaves
is known to be phireg's, and a free lock says that its run is gone. ``replaced`` without
``unfinished`` means that the replacement was finished, ``replaced`` without ``NAME`` that it was
not; the next run into the same target finishes the one or puts back the other.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from phireg.errors import OutputError, PhiregError, UsageError
from phireg.files.kinds import CHECKPOINT, Kind, objection
from phireg.files.sizes import size
from phireg.files.writing import PARTIAL_SUFFIX, REASONS, reason

MARKER = ".phireg-partial"
# Room for directory blocks, the marker and the tokenizer files beside the announced bytes.
SPACE_MARGIN = 16 * 2**20

_ELSEWHERE = "choose another output directory"


class OutputDirectory:
    """Context manager that publishes a checkpoint directory atomically.

    Entering gives the directory to write into. Leaving without an exception makes it durable
    (fsync) and renames it to ``target``; leaving with one removes it.

    ``target`` may be missing (parents are created) or empty; a symbolic link is followed. With
    ``overwrite`` a target that is of ``kind`` (None is any) and holds nothing else is replaced.
    ``required_bytes`` must be free on the disk. Reasons to fail that lie outside phireg (disk full,
    file size limit, no permission, ...) become an OutputError; other errors pass unchanged.
    """

    def __init__(
        self, target: Path, *, overwrite: bool, required_bytes: int, kind: Kind | None = CHECKPOINT
    ) -> None:
        # realpath drops "..", so a symbolic link to "/" or to a parent is seen for what it is.
        resolved = Path(os.path.realpath(target))
        if target.name in ("", "..") or not resolved.name:
            raise OutputError(
                f"the output {str(target)!r} does not name a directory that can be created",
                hint="give a path that ends with the name of the new directory",
            )
        if any(part.endswith(PARTIAL_SUFFIX) for part in resolved.parts):
            raise OutputError(
                f"the output {target} has a name that ends with {PARTIAL_SUFFIX}",
                hint="such names are kept for unfinished outputs; choose another one",
            )
        self._target = resolved
        self._overwrite = overwrite
        self._required_bytes = required_bytes
        self._kind = kind
        self._partial = resolved.with_name(resolved.name + PARTIAL_SUFFIX)
        self._marker = self._partial / MARKER
        self._unfinished = self._partial / "unfinished"
        self._replaced = self._partial / "replaced"
        self._lock: int | None = None
        self._made: os.stat_result | None = None
        self._accepted = False
        self._created_parents: list[Path] = []
        self._published = False

    def __enter__(self) -> Path:
        try:
            self._acquire()
            self._recover()
            self._is_replacing()
            self._check_space()
            self._unfinished.mkdir()
            self._made = self._unfinished.lstat()
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self._unfinished

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._abandon()
            if isinstance(error, OSError) and self._is_ours(error):
                raise self._failure(error) from error
            return
        try:
            self._publish()
        except BaseException as failure:
            self._abandon()
            if isinstance(failure, OSError):
                raise self._failure(failure) from failure
            raise

    def _acquire(self) -> None:
        """Hold the partial directory: create it or take over a stale one, and lock its marker."""
        # A run that ends removes the marker and the directories under our feet: start over then.
        cause = ""
        for _ in range(100):
            try:
                self._make_parents()
                self._make_partial()
                # Only an empty directory may become ours; a marker is never added to another.
                create = 0 if _names(self._partial) else os.O_CREAT
                lock = os.open(self._marker, os.O_RDWR | os.O_NOFOLLOW | create, 0o666)
            except FileNotFoundError as error:
                cause = f"{reason(error)}: "
                names = _names(self._partial)
                if names and MARKER not in names:
                    raise self._not_ours("was not created by phireg") from None
                continue
            try:
                self._flock(lock)
                if _is_at(self._marker, lock):
                    self._lock = lock
                    break
            finally:
                if self._lock is None:
                    os.close(lock)
        else:
            raise OutputError(
                f"cannot write {self._target}: {cause}nothing can be created there, or other "
                "phireg runs keep removing it",
                hint=_ELSEWHERE,
            )
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        os.fsync(lock)
        _fsync(self._partial)

    def _make_partial(self) -> None:
        """Create the partial directory, or accept that of an earlier run of the same user."""
        self._accepted = False
        try:
            self._partial.mkdir(mode=0o700)  # others must not add to what is published
        except FileExistsError:
            status = self._partial.lstat()
            if not stat.S_ISDIR(status.st_mode):
                raise self._not_ours("is not a directory") from None
            if status.st_uid != os.geteuid():
                raise self._not_ours("belongs to another user") from None
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise self._not_ours("can be written by other users") from None
        self._accepted = True

    def _make_parents(self) -> None:
        """Create the missing directories above the target."""
        missing: list[Path] = []
        nearest = self._target.parent
        while not nearest.exists():
            missing.append(nearest)
            nearest = nearest.parent
        if not nearest.is_dir():
            raise OutputError(
                f"cannot write {self._target}: {nearest} is not a directory", hint=_ELSEWHERE
            )
        for parent in reversed(missing):
            with suppress(FileExistsError):
                parent.mkdir()
                self._created_parents.append(parent)

    def _flock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = "another phireg run"
            with suppress(ValueError, KeyError, TypeError):
                marker = json.loads(os.pread(lock, 4096, 0))
                owner += f" (pid {marker['pid']} on {marker['host']})"
            raise OutputError(
                f"{owner} is writing {self._target}",
                hint="wait for it, or choose another output directory",
            ) from None
        except OSError as error:
            raise OutputError(
                f"cannot lock {self._marker}: {reason(error)}",
                hint="write to a file system that supports locks (flock) and copy the result",
            ) from error

    def _not_ours(self, problem: str) -> OutputError:
        return OutputError(
            f"{self._partial} {problem}, so it is left alone",
            hint="move it away, or choose another output directory",
        )

    def _is_replacing(self) -> bool:
        """Return whether publishing replaces something; refuse a target that must stay."""
        try:
            mode = self._target.lstat().st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(mode):
            raise OutputError(
                f"the output {self._target} exists and is not a directory", hint=_ELSEWHERE
            )
        if self._target.is_mount():
            raise OutputError(
                f"the output {self._target} is a mount point, which no directory can replace",
                hint=f"choose a new directory inside it, e.g. {self._target / 'output'}",
            )
        if not _names(self._target):
            return False
        if not self._overwrite:
            raise OutputError(
                f"the output {self._target} exists and is not empty",
                hint="choose another directory, or replace it with --overwrite",
            )
        if not os.access(self._target, os.W_OK):
            raise OutputError(
                f"no permission to replace the output {self._target}", hint=_ELSEWHERE
            )
        if self._kind is not None and (problem := objection(self._target, self._kind)):
            raise OutputError(
                f"--overwrite replaces only {self._kind.name}: {problem}",
                hint="move it away, or choose another output directory",
            )
        return True

    def _check_space(self) -> None:
        free = shutil.disk_usage(self._partial).free
        if free >= self._required_bytes + SPACE_MARGIN:
            return
        message = (
            f"too little disk space for {self._target}: {size(self._required_bytes)} "
            f"(and {size(SPACE_MARGIN)} to spare) are needed, {size(free)} are free"
        )
        if self._is_replacing():
            message += "; the existing output is kept until the new one is complete"
        raise OutputError(message, hint="free some space, or write to another disk")

    def _recover(self) -> None:
        """Complete or undo an interrupted replacement, then delete what is unfinished."""
        own = {MARKER, self._unfinished.name, self._replaced.name}
        for name in _names(self._partial):
            if name not in own:
                raise self._not_ours(f"holds {name!r}, which phireg did not put there")
        if os.path.lexists(self._replaced):
            if not os.path.lexists(self._target) or (
                self._target.is_dir() and not _names(self._target)
            ):
                self._replaced.rename(self._target)
                _fsync(self._target.parent)
            elif os.path.lexists(self._unfinished):
                raise OutputError(
                    f"an interrupted run left the former output in {self._replaced}, "
                    f"and something else is now at {self._target}",
                    hint="move one of the two away",
                )
            else:
                # Deleting under this name: a half deleted "replaced" must never be put back.
                self._replaced.rename(self._unfinished)
        if os.path.lexists(self._unfinished):
            shutil.rmtree(self._unfinished)

    def _publish(self) -> None:
        """Make the output durable, rename it into place and remove the partial directory."""
        partial = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            name = self._unfinished.name
            assert self._made is not None
            if not os.path.samestat(os.lstat(name, dir_fd=partial), self._made):
                raise self._not_ours("was exchanged while it was written")
            _fsync_tree(self._unfinished)
            if self._is_replacing():
                self._target.rename(self._replaced)
                _fsync(self._partial)
            os.rename(name, self._target, src_dir_fd=partial)
        finally:
            os.close(partial)
        self._published = True
        for directory in (self._target, *self._created_parents):
            _fsync(directory.parent)
        self._release()

    def _release(self) -> None:
        assert self._lock is not None
        try:
            self._recover()
            self._marker.unlink()
        finally:
            # Closed before rmdir: NFS keeps an unlinked file in the directory while it is open.
            os.close(self._lock)
            self._lock = None
        # Another run may have moved in, or been through, since the marker went.
        with suppress(OSError):
            self._partial.rmdir()

    def _abandon(self) -> None:
        """Remove what this run created, as far as possible; the next run removes the rest."""
        if self._lock is not None:
            with suppress(OSError, OutputError):
                self._release()
        partial = [self._partial] if self._accepted else []  # an empty one of others stays
        for directory in (*partial, *reversed(self._created_parents)):
            with suppress(OSError):
                directory.rmdir()

    def _is_ours(self, error: OSError) -> bool:
        """Return whether an error from the block is about writing the output."""
        if error.errno not in REASONS:
            return False
        # A failing write() names no file; a failing open() does, and it may be of the source.
        if not isinstance(error.filename, (str, bytes)):
            return True
        return (Path.cwd() / os.fsdecode(error.filename)).is_relative_to(self._unfinished)

    def _failure(self, error: OSError) -> PhiregError:
        """Explain what failed and what is left; called after ``_abandon``."""
        if error.errno == errno.ENAMETOOLONG:
            name = f"{self._target.name[:40]}..."
            return UsageError(f"{name}: the output's name is too long", hint="give a shorter one.")
        if self._published:
            return OutputError(
                f"{self._target} is complete, but finishing failed: {reason(error)}",
                hint=f"if {self._partial} is left, the next run into the same output removes it",
            )
        if os.path.lexists(self._replaced):
            rest = f"the former output is in {self._replaced}"
        elif os.path.lexists(self._unfinished):
            rest = f"the partial output could not be removed from {self._partial}"
        else:
            rest = "nothing of it is left"
        return OutputError(f"cannot write {self._target}: {reason(error)}; {rest}")


def _names(directory: Path) -> list[str]:
    """List a directory that another run may remove at any moment."""
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except FileNotFoundError:
        return []


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a directory, and need no sync.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def _fsync_tree(directory: str | Path) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _fsync_tree(entry.path)
            elif entry.is_file(follow_symlinks=False):
                _fsync(entry.path)
    _fsync(directory)
