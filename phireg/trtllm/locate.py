"""Where ``trtllm-build`` is and which release it belongs to, without importing TensorRT-LLM.

The script may belong to another environment than ours. Asked in this order, the first answer wins:
the interpreter in its first line, for the metadata of its ``tensorrt_llm``; the interpreter beside
it; and at last the script itself, whose first line of output names the version in every release.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from phireg.errors import EngineError
from phireg.trtllm.command import PROGRAM
from phireg.trtllm.releases import INSTALL, release_of

DISTRIBUTION = "tensorrt_llm"
_ASK = f"from importlib.metadata import version; print(version({DISTRIBUTION!r}))"
_BANNER = re.compile(r"TensorRT[- ]LLM version: (\S+)")
_METADATA_S, _BANNER_S = 30, 180


@dataclass(frozen=True, slots=True)
class Builder:
    """An installed builder.

    Attributes:
        program: the script.
        version: of its TensorRT-LLM.
    """

    program: Path
    version: str


def find_builder() -> Builder:
    """The ``trtllm-build`` on PATH.

    Raises:
        EngineError: there is none, it does not say its version, or its release cannot build.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        here = installed_version()
        if here is not None:
            release_of(here)
        raise EngineError(
            f"{PROGRAM} is not on PATH"
            + (f", though tensorrt_llm {here} is installed in {sys.prefix}" if here else ""),
            hint=f"activate the environment it is in, or install it: {INSTALL}; "
            "phireg doctor says what else is missing.",
        )
    program = Path(found)
    version = builder_version(program)
    if version is None:
        raise EngineError(
            f"{program} does not say which release it belongs to",
            hint=f"'{PROGRAM} --help' may say what is wrong with it; phireg doctor looks too.",
        )
    release_of(version)
    return Builder(program, version)


def installed_version() -> str | None:
    """The version of tensorrt_llm in our own environment, from its metadata."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def builder_version(program: Path) -> str | None:
    """The release a builder belongs to, or None if it cannot be found out."""
    for python in _interpreters(program):
        answer = _output([str(python), "-c", _ASK], _METADATA_S)
        if answer is not None and re.fullmatch(r"\d+\.\S+", answer.strip()):
            return answer.strip()
    banner = _BANNER.search(_output([str(program), "--help"], _BANNER_S, errors=True) or "")
    return banner[1] if banner else None


def _interpreters(program: Path) -> Iterator[Path]:
    try:
        with program.open("rb") as file:
            first = file.readline(4096)
    except OSError:
        return
    if first.startswith(b"#!"):
        words = first[2:].decode(errors="replace").split()
        if words and "python" in Path(words[0]).name:
            yield Path(words[0])
        elif len(words) > 1 and "python" in words[-1] and (env := shutil.which(words[-1])):
            yield Path(env)
    beside = program.parent / "python3"
    if beside.exists():
        yield beside


def _output(command: list[str], seconds: float, *, errors: bool = False) -> str | None:
    """What a command prints; None if it fails, unless ``errors``, or takes too long."""
    try:
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.decode(errors="replace") if errors or ran.returncode == 0 else None
