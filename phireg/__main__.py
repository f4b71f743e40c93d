"""The program: ``phireg``, and ``python -m phireg``.

Little is imported before a Ctrl-C is handled, and nothing from the current directory.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # ``signal`` first imports enums, for longer
import os
import sys


def _stop(number: int, frame: object) -> None:
    """End at once: nothing has begun."""
    os.write(2, b"interrupted; nothing was written\n")
    os._exit(128 + number)


def main() -> None:
    """Run the command line."""
    # A shell lets its background jobs ignore Ctrl-C; that stays so.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _stop)
    from phireg.cli import main as run

    run()


if __name__ == "__main__":
    if sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
        del sys.path[0]
    main()
