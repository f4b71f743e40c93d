"""Run conversions that kill themselves: ``output_victim.py SCENARIO BASE`` makes BASE/1, BASE/2 ...

In BASE/N the N-th system call that Python audits (open, mkdir, rename, remove, rmdir, listdir,
flock, ...) or the N-th fsync is replaced by SIGKILL. It ends when a run reached its end alive, and
prints the number of kills.
"""

import fcntl
import json
import os
import signal
import sys
from pathlib import Path

from phireg.files.output import OutputDirectory

OLD = {"config.json": '{"architecture": "Old"}', "rank0.safetensors": "old"}
NEW = {
    "config.json": '{"architecture": "New"}',
    "rank0.safetensors": "new0",
    "rank1.safetensors": "new1",
}
AUDITED = ("open", "os.", "fcntl.", "shutil.rmtree")


def fill(directory, files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def stale(base, **parts):
    """What a killed run leaves: the marker without a lock, and the given sub-directories."""
    partial = base / "out.phireg-partial"
    fill(partial, {".phireg-partial": json.dumps({"pid": 1, "host": "gone"})})
    for name, files in parts.items():
        fill(partial / name, files)


def prepare(scenario, base):
    if scenario in ("overwrite", "interrupted"):
        fill(base / "out", OLD)
    elif scenario == "empty":
        (base / "out").mkdir()
    elif scenario == "stale":
        stale(base, unfinished=NEW)
    elif scenario == "put-back":
        stale(base, unfinished=NEW, replaced=OLD)
    elif scenario == "finish":
        fill(base / "out", NEW)
        stale(base, replaced=OLD)


def convert(scenario, base):
    with OutputDirectory(base / "out", overwrite=True, required_bytes=0) as partial:
        fill(partial, NEW)
        if scenario == "interrupted":
            raise KeyboardInterrupt


def kill_at(number):
    calls = 0

    def count(event):
        nonlocal calls
        if event.startswith(AUDITED):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync, pwrite, flock = os.fsync, os.pwrite, fcntl.flock
    sys.addaudithook(lambda event, _: count(event))
    os.fsync = lambda fd: (count("os.fsync"), fsync(fd))[1]
    os.pwrite = lambda *args: (count("os.pwrite"), pwrite(*args))[1]
    fcntl.flock = lambda *args: (flock(*args), count("fcntl.flock after"))[0]


def main(scenario, base):
    number = 0
    while True:
        number += 1
        (base / str(number)).mkdir(parents=True)
        prepare(scenario, base / str(number))
        child = os.fork()
        if child == 0:
            kill_at(number)
            try:
                convert(scenario, base / str(number))
            except KeyboardInterrupt:
                os._exit(0 if scenario == "interrupted" else 1)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            print(number - 1)
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
