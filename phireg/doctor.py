"""What of the whole road works on this machine, what each missing part prevents, and what to do.

Nothing heavy is imported here: packages are asked through their metadata and, where only an import
tells, in a process of their own with a time limit. One broken part does not hide another.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from phireg import registry
from phireg.errors import EngineError, PluginError
from phireg.trtllm.builder import DISTRIBUTION, builder_version, installed_version
from phireg.trtllm.command import PROGRAM
from phireg.trtllm.releases import INSTALL, LAST, NEWEST, release_of

OK, MISSING, BROKEN, UNSUITABLE = "ok", "missing", "broken", "unsuitable"

_IMPORT_S, _PROGRAM_S = 180, 20
_LITTLE_DISK = 32 * 10**9
"""Bytes: a published Phi-3-mini, its checkpoint and its engine take 23 GB."""

_TORCH = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                  "available": torch.cuda.is_available()}))
"""
_KERNELS = """
import json, torch, warnings
from phireg.executor.attention import has_kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ready = has_kernels(torch.device("cuda"))
print(json.dumps({"ready": ready, "said": " ".join(str(one.message) for one in caught)}))
"""
_ENGINES = "phireg build, and the tensorrt-llm backend of phireg run and phireg summarize"
_GPU_USE = f"{_ENGINES}; the executor runs on the CPU"


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that was looked for.

    Attributes:
        name: what.
        state: ``OK``, ``MISSING``, ``BROKEN`` or ``UNSUITABLE``.
        found: which one, or what is wrong with it.
        prevents: what does not work without it; None if it is fine.
        remedy: the command or step that puts it right; None if it is fine.
    """

    name: str
    state: str
    found: str
    prevents: str | None = None
    remedy: str | None = None


def examine(tell: Callable[[str], None] | None = None) -> list[Part]:
    """Look at every part.

    Args:
        tell: told the name of each part before it is looked at; importing takes a while.
    """
    parts: list[Part] = []
    for name, probe in PROBES.items():
        if tell is not None:
            tell(name)
        try:
            parts += probe()
        except Exception as error:
            # A probe meets whatever state a machine is in, and the others must still be told.
            text = f"{type(error).__name__}: {error}"
            parts.append(Part(name, BROKEN, text, "knowing about it", "look at it by hand"))
    return parts


def _python() -> Iterator[Part]:
    version = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        yield Part("Python", OK, f"{version}, {sys.executable}")
    else:
        yield Part(
            "Python",
            UNSUITABLE,
            f"{version}, {sys.executable}",
            "phireg, which is made for 3.10 to 3.12",
            "install phireg in an environment of Python 3.10 to 3.12",
        )


def _torch() -> Iterator[Part]:
    install = "pip install torch"
    if _version("torch") is None:
        yield Part("torch", MISSING, "", "everything but planning", install)
        return
    told, said = _ask(_TORCH)
    if told is None:
        yield Part("torch", BROKEN, said, "everything but planning", f"{install} --force-reinstall")
        return
    yield Part("torch", OK, told["version"])
    if told["cuda"] is None:
        yield Part(
            "CUDA",
            MISSING,
            "this torch is built for CPUs",
            "running on a GPU",
            "install torch for your CUDA: https://pytorch.org/get-started/locally/",
        )
    elif not told["available"]:
        yield Part(
            "CUDA",
            BROKEN,
            f"torch is built for CUDA {told['cuda']}, but sees no GPU",
            "running on a GPU",
            "see GPU and driver; in a container: docker run --gpus all",
        )
    else:
        yield Part("CUDA", OK, f"{told['cuda']}, as torch is built")
        told, said = _ask(_KERNELS)
        if told is not None and told["ready"]:
            yield Part("GPU kernels", OK, "they can be built")
        else:
            yield Part(
                "GPU kernels",
                BROKEN,
                said if told is None else told["said"],
                "generation on a GPU at full speed: it takes several times as long",
                "apt-get install gcc python3-dev",
            )


def _gpu() -> Iterator[Part]:
    remedy = "install NVIDIA's driver: https://www.nvidia.com/drivers; in a container: docker run "
    remedy += "--gpus all"
    if shutil.which("nvidia-smi") is None:
        for name in ("GPU", "driver"):
            yield Part(name, MISSING, "there is no nvidia-smi", _GPU_USE, remedy)
        return
    query = "name,memory.total,compute_cap,driver_version"
    ran = _run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], _PROGRAM_S)
    rows = [line.split(", ") for line in ran.output.splitlines()]
    if ran.code != 0 or not rows or any(len(row) != 4 for row in rows):
        found = ran.last or "nvidia-smi names no GPU"
        for name in ("GPU", "driver"):
            yield Part(name, BROKEN, found, _GPU_USE, remedy)
        return
    gpus = [f"{name} ({memory}, compute capability {cap})" for name, memory, cap, _ in rows]
    yield Part("GPU", OK, "; ".join(gpus))
    yield Part("driver", OK, rows[0][3])


def _mpi() -> Iterator[Part]:
    prevents = "engines of several ranks; trtllm-build needs the library"
    remedy = "apt-get install openmpi-bin libopenmpi-dev"
    if shutil.which("mpirun") is None:
        yield Part("MPI", MISSING, "there is no mpirun", prevents, remedy)
        return
    ran = _run(["mpirun", "--version"], _PROGRAM_S)
    first = next(iter(ran.output.splitlines()), "")
    if ran.code == 0:
        yield Part("MPI", OK, first)
    else:
        yield Part("MPI", BROKEN, ran.last, prevents, remedy)


def _tensorrt() -> Iterator[Part]:
    for name in ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"):
        version = _version(name)
        if version is not None:
            yield Part("tensorrt", OK, version)
            return
    yield Part("tensorrt", MISSING, "", _ENGINES, f"{INSTALL} (brings the one it needs)")


def _tensorrt_llm() -> Iterator[Part]:
    name, version = DISTRIBUTION, installed_version()
    if version is None:
        yield Part(name, MISSING, "", _ENGINES, INSTALL)
        return
    unsuitable = _without_engines(name, version)
    if unsuitable is not None:
        yield unsuitable
        return
    ran = _run([sys.executable, "-c", f"import {DISTRIBUTION}"], _IMPORT_S)
    if ran.code == 0:
        yield Part(name, OK, f"{version}, with the engine backend")
    else:
        yield Part(
            name,
            BROKEN,
            f"{version}; importing it fails: {ran.last}",
            _ENGINES,
            f"{INSTALL} --force-reinstall; or NVIDIA's image "
            f"nvcr.io/nvidia/tensorrt-llm/release:{NEWEST}",
        )


def _trtllm_build() -> Iterator[Part]:
    found = shutil.which(PROGRAM)
    if found is None:
        yield Part(PROGRAM, MISSING, "not on PATH", "phireg build", INSTALL)
        return
    version = builder_version(Path(found))
    if version is None:
        yield Part(
            PROGRAM,
            BROKEN,
            f"{found} does not say which release it belongs to",
            "phireg build",
            f"see what '{PROGRAM} --help' says; {INSTALL} --force-reinstall",
        )
        return
    yield _without_engines(PROGRAM, version) or Part(PROGRAM, OK, f"{version}, {found}")


def _without_engines(name: str, version: str) -> Part | None:
    """A part of a release that cannot build Phi engines; None where it can."""
    try:
        release_of(version)
    except EngineError as error:
        return Part(
            name, UNSUITABLE, error.message, _ENGINES, f"{INSTALL} (the last of all is {LAST})"
        )
    return None


def _modelopt() -> Iterator[Part]:
    version = _version("nvidia-modelopt")
    if version is not None:
        yield Part("modelopt", OK, version)
        return
    yield Part(
        "modelopt",
        MISSING,
        "optional",
        "nothing but the tests that compare with it; phireg quantizes by itself",
        "pip install nvidia-modelopt",
    )


def _summarizing() -> Iterator[Part]:
    for name, prevents, remedy in (
        (
            "datasets",
            "phireg summarize and calibration with cnn_dailymail",
            "pip install 'phireg[data]'",
        ),
        ("rouge-score", "phireg summarize", "pip install rouge-score"),
    ):
        version = _version(name)
        if version is None:
            yield Part(name, MISSING, "", prevents, remedy)
        else:
            yield Part(name, OK, version)


def _disk() -> Iterator[Part]:
    place = Path.cwd()
    free = shutil.disk_usage(place).free
    found = f"{free / 10**9:,.1f} GB free in {place}"
    if free >= _LITTLE_DISK:
        yield Part("disk", OK, found)
        return
    yield Part(
        "disk",
        UNSUITABLE,
        found,
        "a published model here: it, its checkpoint and its engine are 3 to 28 GB each",
        "free some space, or write to another disk",
    )


def _plugins() -> Iterator[Part]:
    found = [candidate for offers in registry.index().values() for candidate in offers]
    if not found:
        yield Part(
            "plugins", MISSING, "", "every conversion", "pip install --force-reinstall phireg"
        )
        return
    broken = []
    for candidate in found:
        try:
            candidate.load()
        except PluginError as error:
            broken.append(f"{candidate.qualified}: {error.message}")
    if broken:
        yield Part(
            "plugins",
            BROKEN,
            "; ".join(broken),
            "converting with these families",
            "phireg plugins --check says more",
        )
    else:
        yield Part("plugins", OK, ", ".join(candidate.name for candidate in found))


PROBES: dict[str, Callable[[], Iterator[Part]]] = {
    "Python": _python,
    "torch": _torch,
    "GPU": _gpu,
    "MPI": _mpi,
    "tensorrt": _tensorrt,
    "tensorrt_llm": _tensorrt_llm,
    PROGRAM: _trtllm_build,
    "modelopt": _modelopt,
    "datasets": _summarizing,
    "disk": _disk,
    "plugins": _plugins,
}
"""In the order of the table."""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class _Ran:
    code: int
    output: str

    @property
    def last(self) -> str:
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with {self.code}"


def _run(command: list[str], seconds: float) -> _Ran:
    """Run a program; code 124 if it takes too long, 126 if it cannot be started."""
    try:
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Ran(124, f"no answer within {seconds} s")
    except OSError as error:
        return _Ran(126, f"it cannot be started: {error.strerror}")
    return _Ran(ran.returncode, ran.stdout.decode(errors="replace"))


def _ask(code: str) -> tuple[dict[str, Any] | None, str]:
    """What code in a fresh interpreter prints last, as JSON; or None and what it said."""
    ran = _run([sys.executable, "-c", code], _IMPORT_S)
    found = re.findall(r"^\{.*\}$", ran.output, re.MULTILINE)
    if ran.code != 0 or not found:
        return None, ran.last
    told: dict[str, Any] = json.loads(found[-1])
    return told, ""
