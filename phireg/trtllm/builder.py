"""The installed ``trtllm-build``: finding it, and running it without leaving a process behind.

TensorRT-LLM is not imported. The script may belong to another environment than ours, so the
interpreter in its first line is asked for the version of its ``tensorrt_llm``, and else the script
itself, whose first line of output names the version in every release.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from phireg.children import environment, find_program, python_command, query, read_output, started
from phireg.errors import EngineError
from phireg.trtllm.command import PROGRAM
from phireg.trtllm.releases import INSTALL, release_of

DISTRIBUTION = "tensorrt_llm"
_ASK = f"from importlib.metadata import version; print(version({DISTRIBUTION!r}))"
_BANNER = re.compile(r"TensorRT[- ]LLM version: (\S+)")
_METADATA_S, _BANNER_S = 30, 180

Listener = Callable[[str], None]
"""Called with each line of output, without its end."""

_LAST_LINES = 20
_LONGEST_LINE = 2**16  # in bytes; a longer one is told in parts


@dataclass(frozen=True, slots=True)
class Builder:
    """An installed builder: its script and its release."""

    program: Path
    version: str


def find_builder() -> Builder:
    """Find the ``trtllm-build`` on PATH, of a release that can build."""
    path = find_program(PROGRAM)
    if path is None:
        here = installed_version(DISTRIBUTION)
        if here is not None:
            release_of(here)
        raise EngineError(
            f"{PROGRAM} is not on PATH"
            + (f", though tensorrt_llm {here} is installed in {sys.prefix}" if here else ""),
            hint=f"activate the environment it is in, or install it: {INSTALL}; "
            "phireg doctor says what else is missing.",
        )
    version = builder_version(Path(path))
    if version is None:
        raise EngineError(
            f"{path} does not say which release it belongs to",
            hint=f"'{PROGRAM} --help' may say what is wrong with it; phireg doctor looks too.",
        )
    release_of(version)
    return Builder(Path(path), version)


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution in our own environment, from its metadata."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def builder_version(program: Path) -> str | None:
    """Return the release that a builder belongs to; None if it is unknown."""
    first_line = b""
    with suppress(OSError), program.open("rb") as file:
        first_line = file.readline(4096)
    if interpreter := re.match(rb"#!\s*(\S*python\S*)", first_line):
        code, output = query(python_command(_ASK, os.fsdecode(interpreter[1])), _METADATA_S)
        if code == 0 and (version := re.search(r"^\d+\.\S+$", output, re.MULTILINE)):
            return version[0]
    banner = _BANNER.search(query([str(program), "--help"], _BANNER_S)[1])
    return banner[1] if banner else None


def run_builder(
    command: Sequence[str],
    log: IO[bytes],
    listen: Listener | None = None,
    directory: Path | None = None,
) -> tuple[int, list[str]]:
    """Run a command to its end, in a process group of its own, with its output in ``log``.

    Whatever is raised here, a signal's KeyboardInterrupt included, ends the whole group first.
    Returns the exit code (negative for a signal) and the last lines of output that are not empty.
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)

    def tell(raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
        if line.strip():
            last.append(line)
        if listen is not None:
            listen(line)

    pending = b""
    unbuffered = environment() | {"PYTHONUNBUFFERED": "1"}
    with started(command, env=unbuffered, cwd=directory) as process:
        assert process.stdout is not None
        for block in read_output(process.pid, process.stdout.fileno()):
            log.write(block)
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                tell(line)
            if len(pending) > _LONGEST_LINE:
                tell(pending)
                pending = b""
        if pending:
            tell(pending)
    return process.returncode, list(last)
