"""Run phireg and let an accident happen: ``convert_victim.py ACCIDENT NUMBER BASE ARGUMENTS...``.

At the NUMBER-th moment at which a conversion changes the disk (mkdir, creating a file, half of a
pwrite, fsync, rename, remove) the ACCIDENT happens: a signal, or "full", which fills the disk with
BASE/filler. With NUMBER 0 nothing happens, and the moments are counted: BASE/moments lists them.

Several NUMBERs, with a comma between them, have a process each, and {} in BASE and the ARGUMENTS is
the number; their exit codes are printed.
"""

import errno
import os
import signal
import sys
import threading
from pathlib import Path

# Imported before anything is counted.
import phireg.cli.convert
import phireg.conversion.convert  # noqa: F401
from phireg.cli import main

WATCHED = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
lock = threading.Lock()
moments = []


def fill(base):
    with (base / "filler").open("wb", buffering=0) as file:
        block = bytes(2**20)
        while block:
            try:
                file.write(block)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                block = block[: len(block) // 2]


def prepare(accident, number, base):
    def moment(name):
        with lock:
            moments.append(name)
            if len(moments) != number:
                return
        if accident == "full":
            fill(base)
        else:
            os.kill(os.getpid(), signal.Signals[accident])

    def audit(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in WATCHED or writes:
            moment(event)

    fsync, pwrite = os.fsync, os.pwrite

    def half(fd, data, offset):
        data = bytes(data)
        written = pwrite(fd, data[: len(data) // 2 + 1], offset)
        moment("os.pwrite")
        return written

    sys.addaudithook(audit)
    os.pwrite = half
    os.fsync = lambda fd: (moment("os.fsync"), fsync(fd))[1]


def run(accident, number, base, arguments):
    sys.argv = ["phireg", *arguments]
    base.mkdir(exist_ok=True)
    prepare(accident, number, base)
    try:
        main()
    finally:
        if number == 0:
            (base / "moments").write_text("\n".join(moments))


if __name__ == "__main__":
    accident, numbers, base, *arguments = sys.argv[1:]
    if "," not in numbers:
        run(accident, int(numbers), Path(base), arguments)
    for number in numbers.split(","):
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            filled = [text.replace("{}", number) for text in (base, *arguments)]
            run(accident, int(number), Path(filled[0]), filled[1:])
