"""The installed ``trtllm-build``: finding it, and running it without leaving a process behind.

TensorRT-LLM is not imported. The script may belong to another environment than ours, so the
interpreter in its first line is asked for the version of its ``tensorrt_llm``, and else the script
itself, whose first line of output names the version in every release.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from phireg.errors import EngineError
from phireg.trtllm.command import PROGRAM
from phireg.trtllm.releases import INSTALL, release_of

DISTRIBUTION = "tensorrt_llm"
_ASK = f"from importlib.metadata import version; print(version({DISTRIBUTION!r}))"
_BANNER = re.compile(r"TensorRT[- ]LLM version: (\S+)")
_METADATA_S, _BANNER_S = 30, 180

Listener = Callable[[str], None]
"""Called with each line of output, without its end."""

_LAST_LINES = 20
_PATIENCE_S = 5.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True)
class Builder:
    """An installed builder: its script and its release."""

    program: Path
    version: str


def find_builder() -> Builder:
    """Find the ``trtllm-build`` on PATH, of a release that can build."""
    path = shutil.which(PROGRAM)
    if path is None:
        here = installed_version(DISTRIBUTION)
        if here is not None:
            release_of(here)
        raise EngineError(
            f"{PROGRAM} is not on PATH"
            + (f", though tensorrt_llm {here} is installed in {sys.prefix}" if here else ""),
            hint=f"activate the environment it is in, or install it: {INSTALL}; "
            "phireg doctor says what else is missing.",
        )
    version = builder_version(Path(path))
    if version is None:
        raise EngineError(
            f"{path} does not say which release it belongs to",
            hint=f"'{PROGRAM} --help' may say what is wrong with it; phireg doctor looks too.",
        )
    release_of(version)
    return Builder(Path(path), version)


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution in our own environment, from its metadata."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def builder_version(program: Path) -> str | None:
    """Return the release that a builder belongs to; None if it is unknown."""
    first_line = b""
    with suppress(OSError), program.open("rb") as file:
        first_line = file.readline(4096)
    if interpreter := re.match(rb"#!\s*(\S*python\S*)", first_line):
        code, output = query([os.fsdecode(interpreter[1]), "-c", _ASK], _METADATA_S)
        if code == 0 and (version := re.search(r"^\d+\.\S+$", output, re.MULTILINE)):
            return version[0]
    banner = _BANNER.search(query([str(program), "--help"], _BANNER_S)[1])
    return banner[1] if banner else None


def query(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Run a short program: its exit code (124 for no answer in time) and its whole output."""
    try:
        completed = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {seconds} s"
    except OSError as error:
        return 126, f"it cannot be started: {error.strerror}"
    return completed.returncode, completed.stdout.decode(errors="replace")


def run_builder(
    command: Sequence[str], log: Path, listen: Listener | None = None
) -> tuple[int, list[str]]:
    """Run a command to its end, in a process group of its own, with its output in ``log``.

    Whatever is raised here, a signal's KeyboardInterrupt included, ends the whole group first.
    Returns the exit code (negative for a signal) and the last lines of output that are not empty.
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with log.open("ab", buffering=0) as file, ExitStack() as stack:
        with _signals_deferred():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            stack.callback(_end, process)
        assert process.stdout is not None
        for raw in process.stdout:
            file.write(raw)
            line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
            if line.strip():
                last.append(line)
            if listen is not None:
                listen(line)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process.wait(), list(last)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Let signals that are handled in Python take effect at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # they are not handled here
        return
    arrived: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(handler := signal.getsignal(number))
    }
    for number in handlers:
        signal.signal(number, lambda *event: arrived.append(event))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in arrived:
        handlers[number](number, frame)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group; workers of the builder may outlive it.

    The builder is reaped last: until then its number, which is the group's, is not given again.
    """
    try:
        if not _has_ended(process.pid):
            _signal_group(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + _PATIENCE_S
            while not _has_ended(process.pid) and time.monotonic() < deadline:
                time.sleep(0.02)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
