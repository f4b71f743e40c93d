"""Running the builder: its output line by line, and nothing of it left when we stop."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

Listener = Callable[[str], None]
"""Called with each line of output, without its end."""

KEPT_LINES = 2000
_PATIENCE_S = 5.0


def run(command: Sequence[str], log: Path, listen: Listener | None = None) -> tuple[int, list[str]]:
    """Run a command to its end, in a process group of its own.

    Whatever is raised here, a signal's KeyboardInterrupt included, ends the whole group first.

    Args:
        command: the program and its arguments.
        log: takes the whole output, as it comes.
        listen: told each line.

    Returns:
        The exit code (negative for a signal) and the last lines of the output.

    Raises:
        OSError: the program cannot be started, or the log cannot be written.
    """
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    with log.open("ab", buffering=0) as file, ExitStack() as ending:
        with _signals_wait():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            ending.callback(_end, process)
        assert process.stdout is not None
        for raw in process.stdout:
            file.write(raw)
            line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
            kept.append(line)
            if listen is not None:
                listen(line)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process.wait(), list(kept)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let signals that are handled in Python take effect at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # they are not handled here
        return
    arrived: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda *event: arrived.append(event))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for event in arrived:
        handler = handlers[signal.Signals(event[0])]
        assert callable(handler)
        handler(*event)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group; workers of the builder may outlive it.

    The builder is reaped last: until then its number, which is the group's, is not given again.
    """
    try:
        if not _ended(process.pid):
            _signal(process.pid, signal.SIGTERM)
            patience = time.monotonic() + _PATIENCE_S
            while not _ended(process.pid) and time.monotonic() < patience:
                time.sleep(0.02)
    finally:
        _signal(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
