"""The program: ``phireg``, and ``python -m phireg``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has begun."""
    os.write(2, b"interrupted; nothing was written\n")
    os._exit(128 + number)


def main() -> None:
    """Run the command line; Ctrl-C counts from the first moment."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from phireg.cli import main as run

    run()


if __name__ == "__main__":
    # Python put the current directory there, which may be a stranger's model.
    if sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
        del sys.path[0]
    main()
