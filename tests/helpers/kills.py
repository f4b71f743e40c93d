"""Run something in forked processes that SIGKILL ends one change of the disk later each time."""

import fcntl
import os
import signal
import sys

AUDITED = ("open", "os.", "shutil.rmtree", "fcntl.")
READS = ("os.listdir", "os.scandir", "os.getxattr", "os.listxattr")
"""The disk is then as at the next change."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SMALL = 2000
"""Writes of fewer bytes are not counted, or nearly all moments would be writes of single rows."""


def _kill_at(number):
    """Kill this process at the N-th change of the disk, fsync, lock, or half of a write."""
    calls = 0

    def moment(event, arguments=()):
        nonlocal calls
        reads = event in READS or (event == "open" and not arguments[2] & WRITES)
        if event.startswith(AUDITED) and not reads:
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync, pwrite, flock = os.fsync, os.pwrite, fcntl.flock

    def half(descriptor, data, offset):
        if len(data) < SMALL:
            return pwrite(descriptor, data, offset)
        written = pwrite(descriptor, bytes(data)[: len(data) // 2 + 1], offset)
        moment("os.pwrite")
        return written

    sys.addaudithook(moment)
    os.fsync = lambda descriptor: (moment("os.fsync"), fsync(descriptor))[1]
    os.pwrite = half
    fcntl.flock = lambda *args: (flock(*args), moment("fcntl.flock after"))[0]


def kill_everywhere(base, prepare, run):
    """Prepare BASE/1, BASE/2, ... and run in each until a run ends alive.

    Prints the number of kills; returns the exit code of the last run, 1 after an exception.
    """
    number = 0
    while True:
        number += 1
        directory = base / str(number)
        prepare(directory)
        child = os.fork()
        if child == 0:
            _kill_at(number)
            try:
                run(directory)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            print(number - 1)
            return os.waitstatus_to_exitcode(status)
