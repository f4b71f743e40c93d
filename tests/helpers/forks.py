"""phireg as a process of its own that has imported what it needs: a fork of the tests' process."""

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
    stdout: str
    stderr: str


class Fork:
    """``phireg WORDS...`` with the given environment; ``path`` is searched for modules first."""

    def __init__(self, words, cwd, environment, path=()):
        self.output = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process:
            return
        try:
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for descriptor, file in enumerate(self.output, 1):
                os.dup2(file.fileno(), descriptor)
            sys.stdin, sys.stdout, sys.stderr = (
                os.fdopen(descriptor, mode, closefd=False)
                for descriptor, mode in enumerate(("r", "w", "w"))
            )
            sys.path[:0] = map(str, path)
            sys.argv = ["phireg", *words]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            from phireg.__main__ import main

            main()
        except SystemExit as ended:
            self._leave(ended.code)
        except BaseException:
            traceback.print_exc()
            self._leave(1)
        self._leave(0)

    def _leave(self, code):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)

    def wait(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        texts = []
        for file in self.output:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ran(code, *texts)


def run_forked(*words, cwd, environment, path=()):
    """Run it to its end."""
    return Fork([str(word) for word in words], cwd, environment, path).wait()
