"""Report which features this environment supports, and what enables the others.

Nothing heavy is imported here: packages are asked through their metadata and, where only an import
tells, in a process of their own with a time limit. One broken part does not hide another.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from phireg import registry
from phireg.errors import EngineError, PluginError
from phireg.trtllm.builder import DISTRIBUTION, builder_version, installed_version, query
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
    available = has_kernels(torch.device("cuda"))
print(json.dumps({"available": available, "warnings": " ".join(str(w.message) for w in caught)}))
"""
_ENGINES = "phireg build, and the tensorrt-llm backend of phireg run and phireg summarize"
_GPU_USE = f"{_ENGINES}; the executor runs on the CPU"
_DRIVER = (
    "install NVIDIA's driver: https://www.nvidia.com/drivers; in a container: docker run --gpus all"
)


@dataclass(frozen=True, slots=True)
class Part:
    """The result of a check.

    Attributes:
        name: of what was checked.
        state: ``OK``, ``MISSING``, ``BROKEN`` or ``UNSUITABLE``.
        found: its version or place, or what is wrong with it.
        prevents: what does not work without it; None if it is fine.
        remedy: the command or step that helps; None if it is fine.
    """

    name: str
    state: str
    found: str
    prevents: str | None = None
    remedy: str | None = None


def examine(started: Callable[[str], None] | None = None) -> list[Part]:
    """Run every check; ``started`` is called with the name of each, since importing takes long."""
    parts: list[Part] = []
    for name, check in CHECKS.items():
        if started is not None:
            started(name)
        try:
            parts += check()
        except Exception as error:  # a defect of one check, on a machine in an unforeseen state
            text = f"{type(error).__name__}: {error}"
            parts.append(Part(name, BROKEN, text, "knowing about it", "look at it by hand"))
    return parts


def _python() -> Iterator[Part]:
    found = f"{platform.python_version()}, {sys.executable}"
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        yield Part("Python", OK, found)
    else:
        prevents = "phireg, which is made for 3.10 to 3.12"
        remedy = "install phireg in an environment of Python 3.10 to 3.12"
        yield Part("Python", UNSUITABLE, found, prevents, remedy)


def _torch() -> Iterator[Part]:
    install, prevents = "pip install torch", "everything but planning"
    if _version("torch") is None:
        yield Part("torch", MISSING, "", prevents, install)
        return
    torch, problem = _ask(_TORCH)
    if torch is None:
        yield Part("torch", BROKEN, problem, prevents, f"{install} --force-reinstall")
        return
    yield Part("torch", OK, torch["version"])
    prevents = "running on a GPU"
    if torch["cuda"] is None:
        remedy = "install torch for your CUDA: https://pytorch.org/get-started/locally/"
        yield Part("CUDA", MISSING, "this torch is built for CPUs", prevents, remedy)
    elif not torch["available"]:
        found = f"torch is built for CUDA {torch['cuda']}, but sees no GPU"
        remedy = "see GPU and driver; in a container: docker run --gpus all"
        yield Part("CUDA", BROKEN, found, prevents, remedy)
    else:
        yield Part("CUDA", OK, f"{torch['cuda']}, as torch is built")
        yield _kernels()


def _kernels() -> Part:
    kernels, problem = _ask(_KERNELS)
    if kernels is not None and kernels["available"]:
        return Part("GPU kernels", OK, "they can be built")
    prevents = "generation on a GPU at full speed: it takes several times as long"
    found = problem if kernels is None else kernels["warnings"]
    return Part("GPU kernels", BROKEN, found, prevents, "apt-get install gcc python3-dev")


def _gpu() -> Iterator[Part]:
    state, found = MISSING, "there is no nvidia-smi"
    if shutil.which("nvidia-smi") is not None:
        fields = "--query-gpu=name,memory.total,compute_cap,driver_version"
        code, output = query(["nvidia-smi", fields, "--format=csv,noheader"], _PROGRAM_S)
        rows = [line.split(", ") for line in output.splitlines()]
        if code == 0 and rows and all(len(row) == 4 for row in rows):
            gpus = [f"{name} ({memory}, compute capability {cap})" for name, memory, cap, _ in rows]
            yield Part("GPU", OK, "; ".join(gpus))
            yield Part("driver", OK, rows[0][3])
            return
        state, found = BROKEN, _last_line(code, output)
    for name in ("GPU", "driver"):
        yield Part(name, state, found, _GPU_USE, _DRIVER)


def _mpi() -> Iterator[Part]:
    state, found = MISSING, "there is no mpirun"
    if shutil.which("mpirun") is not None:
        code, output = query(["mpirun", "--version"], _PROGRAM_S)
        if code == 0:
            yield Part("MPI", OK, output.partition("\n")[0])
            return
        state, found = BROKEN, _last_line(code, output)
    prevents = "engines of several ranks; trtllm-build needs the library"
    yield Part("MPI", state, found, prevents, "apt-get install openmpi-bin libopenmpi-dev")


_PACKAGES = {
    "tensorrt": (
        ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
        _ENGINES,
        f"{INSTALL} (brings the one it needs)",
    ),
    "modelopt": (
        ("nvidia-modelopt",),
        "nothing but the tests that compare with it; phireg quantizes by itself",
        "pip install nvidia-modelopt",
    ),
    "datasets": (
        ("datasets",),
        "phireg summarize and calibration with cnn_dailymail",
        "pip install 'phireg[data]'",
    ),
    "rouge-score": (("rouge-score",), "phireg summarize", "pip install rouge-score"),
}
"""Packages whose metadata suffices: their distributions, what they prevent, and the remedy."""


def _package(name: str) -> Iterator[Part]:
    distributions, prevents, remedy = _PACKAGES[name]
    versions = [version for version in map(_version, distributions) if version is not None]
    if versions:
        yield Part(name, OK, versions[0])
    else:
        yield Part(name, MISSING, "", prevents, remedy)


def _tensorrt_llm() -> Iterator[Part]:
    name, version = DISTRIBUTION, installed_version()
    if version is None:
        yield Part(name, MISSING, "", _ENGINES, INSTALL)
    elif unsuitable := _without_engines(name, version):
        yield unsuitable
    else:
        code, output = query([sys.executable, "-c", f"import {DISTRIBUTION}"], _IMPORT_S)
        if code == 0:
            yield Part(name, OK, f"{version}, with the engine backend")
            return
        found = f"{version}; importing it fails: {_last_line(code, output)}"
        image = f"nvcr.io/nvidia/tensorrt-llm/release:{NEWEST}"
        remedy = f"{INSTALL} --force-reinstall; or NVIDIA's image {image}"
        yield Part(name, BROKEN, found, _ENGINES, remedy)


def _trtllm_build() -> Iterator[Part]:
    path = shutil.which(PROGRAM)
    if path is None:
        yield Part(PROGRAM, MISSING, "not on PATH", "phireg build", INSTALL)
        return
    version = builder_version(Path(path))
    if version is None:
        found = f"{path} does not say which release it belongs to"
        remedy = f"see what '{PROGRAM} --help' says; {INSTALL} --force-reinstall"
        yield Part(PROGRAM, BROKEN, found, "phireg build", remedy)
    else:
        yield _without_engines(PROGRAM, version) or Part(PROGRAM, OK, f"{version}, {path}")


def _without_engines(name: str, version: str) -> Part | None:
    """The part of a release that cannot build Phi engines; None if it can."""
    try:
        release_of(version)
    except EngineError as error:
        remedy = f"{INSTALL} (the last of all is {LAST})"
        return Part(name, UNSUITABLE, error.message, _ENGINES, remedy)
    return None


def _disk() -> Iterator[Part]:
    directory = Path.cwd()
    free = shutil.disk_usage(directory).free
    found = f"{free / 10**9:,.1f} GB free in {directory}"
    if free >= _LITTLE_DISK:
        yield Part("disk", OK, found)
    else:
        prevents = "a published model here: it, its checkpoint and its engine are 3 to 28 GB each"
        yield Part("disk", UNSUITABLE, found, prevents, "free some space, or write to another disk")


def _plugins() -> Iterator[Part]:
    candidates = [candidate for offers in registry.index().values() for candidate in offers]
    if not candidates:
        remedy = "pip install --force-reinstall phireg"
        yield Part("plugins", MISSING, "", "every conversion", remedy)
        return
    broken = []
    for candidate in candidates:
        try:
            candidate.load()
        except PluginError as error:
            broken.append(f"{candidate.qualified}: {error.message}")
    if broken:
        prevents, remedy = "converting with these families", "phireg plugins --check says more"
        yield Part("plugins", BROKEN, "; ".join(broken), prevents, remedy)
    else:
        yield Part("plugins", OK, ", ".join(candidate.name for candidate in candidates))


CHECKS: dict[str, Callable[[], Iterator[Part]]] = {
    "Python": _python,
    "torch": _torch,
    "GPU": _gpu,
    "MPI": _mpi,
    "tensorrt": partial(_package, "tensorrt"),
    "tensorrt_llm": _tensorrt_llm,
    PROGRAM: _trtllm_build,
    "modelopt": partial(_package, "modelopt"),
    "datasets": partial(_package, "datasets"),
    "rouge-score": partial(_package, "rouge-score"),
    "disk": _disk,
    "plugins": _plugins,
}
"""In the order of the report."""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _last_line(code: int, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with {code}"


def _ask(script: str) -> tuple[dict[str, Any] | None, str]:
    """The JSON object that a script prints last in a fresh interpreter; or None and a problem."""
    code, output = query([sys.executable, "-c", script], _IMPORT_S)
    objects = re.findall(r"^\{.*\}$", output, re.MULTILINE)
    if code != 0 or not objects:
        return None, _last_line(code, output)
    answer: dict[str, Any] = json.loads(objects[-1])
    return answer, ""
