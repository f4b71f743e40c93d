"""Results as they come, one JSON line for each batch, from which a killed run goes on.

The first line says what the results belong to. A last line that was cut off is dropped; anything
else that is not as it was written is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from phireg.checkpoint.manifest import file_digest
from phireg.errors import OutputError
from phireg.summarization.result import Answer, Batch

FORMAT = 1
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.engine")


class Results:
    """The batches done so far, by backend.

    Args:
        batches: those of an earlier run.
        write: appends a line to the file; nothing where there is none.

    Attributes:
        earlier: how many batches an earlier run has done.
    """

    def __init__(
        self, batches: Mapping[str, list[Batch]], write: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._batches = {name: list(done) for name, done in batches.items()}
        self.earlier = sum(map(len, batches.values()))
        self._write = write

    def of(self, backend: str) -> tuple[Batch, ...]:
        """What a backend has done, in order."""
        return tuple(self._batches.get(backend, ()))

    def add(self, backend: str, batch: Batch) -> None:
        """Take the next batch of a backend."""
        done = self._batches.setdefault(backend, [])
        self._write({"backend": backend, "batch": len(done), **asdict(batch)})
        done.append(batch)


def model_digest(place: Path) -> dict[str, str]:
    """xxh3_128 of each of a model's files, whole."""
    names = sorted({path for kind in _MODEL_FILES for path in place.glob(kind)})
    return {path.name: file_digest(path) for path in names}


@contextmanager
def open_results(
    path: Path | None, identity: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Results]:
    """Read what an earlier run has done, and keep the file for what follows.

    Args:
        path: the file; None keeps results in memory only.
        identity: settings, models and data; JSON. Results of others are refused.
        overwrite: start anew, whatever the file holds, if it is one of these.

    Raises:
        OutputError: the file is something else, damaged, in use, or belongs to other settings; or
            it cannot be written.
    """
    if path is None:
        yield Results({}, lambda _: None)
        return
    header = {"phireg_summarize": FORMAT, **identity}
    try:
        file = path.open("a+b")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"{path}: another run is writing it", hint="give --results another file."
            ) from None
        batches = _earlier(path, file, json.loads(json.dumps(header)), overwrite)
        yield Results(batches, lambda line: _append(path, file, line))


def _append(path: Path, file: IO[bytes], line: Mapping[str, Any]) -> None:
    try:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}",
            hint="make room; the same command then goes on where it stopped.",
        ) from None


def _earlier(
    path: Path, file: IO[bytes], header: dict[str, Any], overwrite: bool
) -> dict[str, list[Batch]]:
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1  # what follows was cut off
    lines = content[:end].splitlines()
    if not lines and not content.startswith(b'{"phireg_summarize"'[: len(content)]):
        raise _foreign(path)
    found = _parsed(path, 1, lines[0]) if lines else {}
    if lines and found.get("phireg_summarize") != FORMAT:
        raise _foreign(path)
    if not lines or overwrite:
        file.truncate(0)
        _append(path, file, header)
        return {}
    differing = sorted(
        key for key in header.keys() | found.keys() if header.get(key) != found.get(key)
    )
    if differing:
        raise OutputError(
            f"{path} holds the results of another run: {_difference(header, found, differing[0])}",
            hint="give --results another file, or --overwrite to start anew.",
        )
    file.truncate(end)
    batches: dict[str, list[Batch]] = {}
    for number, line in enumerate(lines[1:], 2):
        record = _parsed(path, number, line)
        try:
            done = batches.setdefault(record["backend"], [])
            answers = tuple(Answer(**answer) for answer in record["answers"])
            batch = Batch(record["seconds"], record["memory"], answers)
            in_order = record["batch"] == len(done)
        except (KeyError, TypeError):
            in_order = False
        if not in_order:
            raise _damaged(path, number)
        done.append(batch)
    return batches


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> str:
    """The first value that differs, by its path."""
    one, other = ours.get(key), theirs.get(key)
    if isinstance(one, dict) and isinstance(other, dict):
        inner = next(k for k in sorted(one.keys() | other.keys()) if one.get(k) != other.get(k))
        return f"{key}: {_difference(one, other, inner)}"
    return f"{key} was {json.dumps(other)}, and is now {json.dumps(one)}"


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return record
    raise _foreign(path) if number == 1 else _damaged(path, number)


def _foreign(path: Path) -> OutputError:
    return OutputError(
        f"{path} exists and is not a results file of phireg summarize",
        hint="give --results another file.",
    )


def _damaged(path: Path, number: int) -> OutputError:
    return OutputError(
        f"{path}:{number}: damaged", hint="give --overwrite to start anew, or another --results."
    )
