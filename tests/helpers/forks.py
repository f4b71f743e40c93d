"""phireg as a process of its own that has imported what it needs: a fork of the tests' process."""

import atexit
import os
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass


@dataclass
class Ran:
    """As :class:`subprocess.CompletedProcess`."""

    returncode: int
    stdout: bytes
    stderr: bytes


def become_phireg(words, environment=None, path=()):
    """Run ``phireg WORDS...`` in this process, a fork, and end it; its descriptors are its own."""
    code = 1
    atexit._clear()  # what the tests' process registered
    try:
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(descriptor, mode, closefd=False)
            for descriptor, mode in enumerate(("r", "w", "w"))
        )
        sys.path[:0] = map(str, path)
        sys.argv = ["phireg", *map(str, words)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from phireg.__main__ import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Fork:
    """``phireg WORDS...`` with the given environment; ``path`` is searched for modules first."""

    def __init__(self, words, cwd=".", environment=None, path=(), stdin=b""):
        self.files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        self.files[0].write(stdin)
        self.files[0].seek(0)
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            os.chdir(cwd)
            for descriptor, file in enumerate(self.files):
                os.dup2(file.fileno(), descriptor)
            become_phireg(words, environment, path)

    def wait(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        outputs = []
        for file in self.files:
            file.seek(0)
            outputs.append(file.read())
            file.close()
        return Ran(code, *outputs[1:])


def run_forked(words, **options):
    """Run it to its end."""
    return Fork(words, **options).wait()
