"""Child processes: how every one is started, read and ended.

The current directory may be a stranger's model, so no child looks for modules or programs there.
Nothing waits for what a child leaves behind: each has a process group of its own, which is ended
with it.
"""

from __future__ import annotations

import math
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from phireg.errors import described

_NOT_HERE = "import sys; sys.path[:] = filter(None, sys.path)\n"
"""What ``-P`` does for a script of ``-c``; Python 3.10 has no such option."""

_ROOT = "/"
_MOST_OUTPUT = 2**20
_PIPE = 2**20  # bytes of a pipe at most, unless root made it larger
_WAIT_S = 0.05
_GPUS_S = 20
_PATIENCE_S = 5.0  # between SIGTERM and SIGKILL


class ChildError(Exception):
    """A call in a child did not return; the text says why."""


def python_command(script: str, interpreter: str = sys.executable) -> list[str]:
    """Return the command that runs a script, which finds no module in the current directory."""
    return [interpreter, "-c", _NOT_HERE + script]


def environment() -> dict[str, str]:
    """Return this environment without ways into the current directory, for a child and its own."""
    # Relative and empty entries are left out of PATH; those of PYTHONPATH become absolute.
    programs, modules = (
        filter(None, os.environ.get(name, default).split(os.pathsep))
        for name, default in (("PATH", os.defpath), ("PYTHONPATH", ""))
    )
    return os.environ | {
        "PATH": os.pathsep.join(filter(os.path.isabs, programs)),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, modules)),
        "PYTHONSAFEPATH": "1",
    }


def find_program(name: str) -> str | None:
    """Return the path of a program."""
    return shutil.which(name, path=environment()["PATH"])


def query(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Run a short program: its exit code (124 for no answer in time) and its output, bounded."""
    output = bytearray()
    try:
        with started(command, cwd=_ROOT) as process:
            assert process.stdout is not None
            for block in read_output(process.pid, process.stdout.fileno(), seconds):
                output += block[: _MOST_OUTPUT - len(output)]
    except TimeoutError:
        return 124, f"no answer within {seconds} s"
    except OSError as error:
        return 126, f"it cannot be started: {error.strerror}"
    return process.returncode, output.decode(errors="replace")


def query_gpus(fields: str) -> tuple[int | None, str]:
    """Ask nvidia-smi, as ``query`` does, for a line of each GPU; None if there is no nvidia-smi."""
    program = find_program("nvidia-smi")
    if program is None:
        return None, ""
    return query([program, f"--query-gpu={fields}", "--format=csv,noheader"], _GPUS_S)


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program with its output in a pipe; whatever happens, end it with its whole group."""
    with ExitStack() as stack:
        with _signals_deferred():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **{"env": environment(), **options},
            )
            stack.callback(_end, process)
        yield process


def read_output(pid: int, pipe: int, seconds: float = math.inf) -> Iterator[bytes]:
    """Yield what a child writes until it ends; TimeoutError if it does not end in time."""
    # Until it ends, not until the pipe does: others may hold the other end.
    deadline = time.monotonic() + seconds
    os.set_blocking(pipe, False)
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    is_open = True
    while not _has_ended(pid):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if not is_open:
            time.sleep(_WAIT_S / 10)
        elif poll.poll(1000 * min(left, _WAIT_S)):
            block = os.read(pipe, _PIPE)
            is_open = block != b""
            yield block
    with suppress(BlockingIOError):
        yield os.read(pipe, _PIPE)  # what it wrote last


def call(
    function: Callable[[], str],
    *,
    seconds: float,
    memory: int | None = None,
    longest: int = _MOST_OUTPUT,
) -> str:
    """Return what a function returns in a forked copy of this process.

    Whatever it does there leaves this process unharmed. ChildError says why nothing came back: an
    error of any kind, the end of the process, more time, more bytes of ``memory`` than it had or
    more bytes of text than ``longest``.
    """
    pipe, end = os.pipe()
    answer = bytearray()
    codes: list[int] = []
    try:
        with ExitStack() as stack:
            stack.callback(os.close, pipe)
            with _signals_deferred(), warnings.catch_warnings(), open(end, "wb"):  # noqa: PTH123
                # Threads hold no lock that the function needs, and a deadlock would end in time.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
                if pid == 0:
                    _answer(function, end, seconds, memory)
                stack.callback(lambda: codes.append(_killed(pid)))
            for block in read_output(pid, pipe, seconds):
                answer += block
                if len(answer) > longest:
                    raise ChildError(f"its text has more than {longest:,} bytes")
    except TimeoutError:
        raise ChildError(f"it takes more than {seconds:g} s") from None
    except OSError as error:
        raise ChildError(f"no process can be started: {error.strerror}") from None
    (code,) = codes
    if code or not answer:  # what it wrote may end anywhere
        how = f"with code {code}" if code >= 0 else f"by signal {-code}"
        raise ChildError(f"it ended the process {how}")
    if answer[:1] == b"-":
        raise ChildError(answer[1:].decode())
    return answer[1:].decode()


def _answer(function: Callable[[], str], pipe: int, seconds: float, memory: int | None) -> NoReturn:
    """Write a function's result, after ``+``, or its error, after ``-``, and end."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        # Should the parent be killed, nothing else would end an endless loop.
        _limit(resource.RLIMIT_CPU, math.ceil(seconds) * (os.cpu_count() or 1) + 1)
        if memory is not None:
            with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
                pages = int(file.read().split()[0])
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)
        try:
            answer = b"+" + function().encode()
        except MemoryError:
            answer = b"-it needs more memory than it may have"
        except BaseException as error:
            answer = b"-" + described(error).encode(errors="backslashreplace")
        written = 0
        while written < len(answer):
            written += os.write(pipe, answer[written : written + _PIPE])
        code = 0
    finally:
        os._exit(code)


def _killed(pid: int) -> int:
    """End a forked process, if it has not ended, with its group; return its exit code."""
    _signal_group(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it may have no group yet
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


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
    """End every process of the group; the program is reaped last, to keep its number taken."""
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
