"""Limits on the time and the memory of what runs inside."""

import resource
import signal
from contextlib import contextmanager
from pathlib import Path


class TooLong(BaseException):
    """Not an Exception: nobody catches it."""


@contextmanager
def bounded(seconds=20, memory=2**31):
    """End what takes longer (TooLong), and refuse memory beyond what the process has now."""

    def stop(number, frame):
        raise TooLong(f"not done after {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
