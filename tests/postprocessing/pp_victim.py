"""Post-process in place and die: ``pp_victim.py SOURCE BASE`` makes BASE/1, BASE/2, ...

In BASE/N the N-th system call of the writing part (write, open, mkdir, rename, remove, rmdir,
chmod, fsync) is replaced by SIGKILL. It ends when a run reached its end alive, and prints the
number of kills.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import phireg

AUDITED = ("open", "os.", "shutil.rmtree", "fcntl.")


def kill_at(number):
    calls = 0

    def count(event):
        nonlocal calls
        if event.startswith(AUDITED):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync, pwrite = os.fsync, os.pwrite

    def half(descriptor, data, offset):
        if len(data) < 2000:  # else nearly all moments would be writes of single rows
            return pwrite(descriptor, data, offset)
        written = pwrite(descriptor, bytes(data)[: len(data) // 2 + 1], offset)
        count("os.pwrite")
        return written

    sys.addaudithook(lambda event, _: count(event))
    os.fsync = lambda fd: (count("os.fsync"), fsync(fd))[1]
    os.pwrite = half


def main(source, base):
    # What is imported lazily is imported here, or every import would be a moment.
    shutil.copytree(source, base / "0" / "ckpt")
    phireg.postprocess(base / "0" / "ckpt")
    number = 0
    while True:
        number += 1
        shutil.copytree(source, base / str(number) / "ckpt")
        child = os.fork()
        if child == 0:
            kill_at(number)
            try:
                phireg.postprocess(base / str(number) / "ckpt")
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            print(number - 1)
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
