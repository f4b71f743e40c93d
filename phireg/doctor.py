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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from phireg import registry
from phireg.children import find_program, python_command, query, query_gpus
from phireg.errors import EngineError, PluginError, described
from phireg.tensorrt.package import INSTALL as PACKAGES
from phireg.tensorrt.package import Backend, installed
from phireg.trtllm.builder import DISTRIBUTION, builder_version, installed_version
from phireg.trtllm.command import PROGRAM
from phireg.trtllm.releases import INSTALL, release_of

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
_NATIVE = """
import json
from phireg.errors import EngineError
from phireg.tensorrt.package import load_package
answer = {{"problem": None, "version": None, "gpus": []}}
try:
    package = load_package({!r})
    answer.update(version=package.version, gpus=package.capabilities)
except EngineError as error:
    answer["problem"] = error.message
print(json.dumps(answer))
"""
_ENGINES = (
    "phireg build --backend tensorrt-llm, and that backend of phireg run and phireg summarize"
)
_GPU = (
    "running engines, and all that TensorRT-LLM does; phireg build --backend tensorrt-rtx and the "
    "executor need no GPU",
    "install NVIDIA's driver: https://www.nvidia.com/drivers; in a container: docker run --gpus "
    "all",
)
_ADVICE = {
    "Python": (
        "phireg, which is made for 3.10 to 3.14",
        "install phireg in an environment of Python 3.10 to 3.14",
    ),
    "torch": ("everything but planning", "pip install torch"),
    "CUDA": (
        "running on a GPU",
        "install torch for your CUDA: https://pytorch.org/get-started/locally/; see GPU and "
        "driver; in a container: docker run --gpus all",
    ),
    "GPU kernels": (
        "generation on a GPU at full speed: it takes several times as long",
        "apt-get install gcc python3-dev",
    ),
    "GPU": _GPU,
    "driver": _GPU,
    "MPI": (
        "engines of several ranks; trtllm-build needs the library",
        "apt-get install openmpi-bin libopenmpi-dev",
    ),
    "tensorrt": (
        "engines for data-center GPUs without TensorRT-LLM, and TensorRT-LLM itself",
        PACKAGES["tensorrt"],
    ),
    "tensorrt-rtx": (
        "engines for RTX cards without TensorRT-LLM, which build on any machine",
        PACKAGES["tensorrt-rtx"],
    ),
    DISTRIBUTION: (_ENGINES, INSTALL),
    PROGRAM: ("phireg build --backend tensorrt-llm", INSTALL),
    "modelopt": (
        "nothing but the tests that compare with it; phireg quantizes by itself",
        "pip install nvidia-modelopt",
    ),
    "datasets": (
        "phireg summarize and calibration with cnn_dailymail",
        "pip install 'phireg[data]'",
    ),
    "rouge-score": ("phireg summarize", "pip install rouge-score"),
    "disk": (
        "a published model here: it, its checkpoint and its engine are 3 to 28 GB each",
        "free some space, or write to another disk",
    ),
    "plugins": (
        "converting with these families",
        "see phireg families --check; without any: pip install --force-reinstall phireg",
    ),
}
"""By part: what does not work without it, and the remedy."""


@dataclass(frozen=True, slots=True)
class Part:
    """The result of a check; what it prevents and the remedy are None if it is fine."""

    name: str
    state: str
    found: str  # its version or place, or what is wrong with it
    prevents: str | None = None
    remedy: str | None = None


_ABILITIES: dict[str, tuple[str, ...]] = {
    "plan, convert, explain, inspect": ("Python", "plugins"),
    "quantize, verify, run and demo": ("Python", "plugins", "torch"),
    "the same on a GPU": ("torch", "CUDA", "GPU", "driver"),
    "summarize": ("torch", "rouge-score"),
    "summarize cnn_dailymail": ("torch", "rouge-score", "datasets"),
    "build engines of TensorRT for RTX": ("tensorrt-rtx",),
    "build engines of TensorRT": ("tensorrt",),
    "build engines of TensorRT-LLM": (PROGRAM,),
    "run engines of TensorRT-LLM": (DISTRIBUTION, "GPU", "driver"),
    "run engines of several ranks": (DISTRIBUTION, "GPU", "driver", "MPI"),
}
"""What phireg can do: the parts that it takes."""


@dataclass(frozen=True, slots=True)
class Ability:
    """Something that phireg can do here, or the parts that it lacks."""

    name: str
    lacks: tuple[str, ...]


def abilities(parts: Sequence[Part]) -> list[Ability]:
    """Tell what works with the parts that were found."""
    fine = {part.name for part in parts if part.state == OK}
    return [
        Ability(name, tuple(part for part in needed if part not in fine))
        for name, needed in _ABILITIES.items()
    ]


def examine(started: Callable[[str], None] | None = None) -> list[Part]:
    """Run every check; ``started`` is called with the name of each, since importing takes long."""
    parts: list[Part] = []
    for name, check in CHECKS.items():
        if started is not None:
            started(name)
        try:
            parts += check()
        except EngineError as error:  # a release that cannot build Phi engines
            parts.append(_part(name, UNSUITABLE, error.message))
        except Exception as error:  # a defect of one check, on a machine in an unforeseen state
            parts.append(_part(name, BROKEN, described(error)))
    return parts


def _part(name: str, state: str, found: str = "") -> Part:
    if state == OK:
        return Part(name, state, found)
    prevents, remedy = _ADVICE[name]
    if state == BROKEN and remedy.startswith("pip install"):
        remedy += " --force-reinstall"
    return Part(name, state, found, prevents, remedy)


def _python() -> Iterator[Part]:
    supported = (3, 10) <= sys.version_info[:2] <= (3, 14)
    text = f"{platform.python_version()}, {sys.executable}"
    yield _part("Python", OK if supported else UNSUITABLE, text)


def _torch() -> Iterator[Part]:
    if installed_version("torch") is None:
        yield _part("torch", MISSING)
        return
    torch, problem = _ask(_TORCH)
    if torch is None:
        yield _part("torch", BROKEN, problem)
        return
    yield _part("torch", OK, torch["version"])
    if torch["cuda"] is None:
        yield _part("CUDA", MISSING, "this torch is built for CPUs")
    elif not torch["available"]:
        yield _part("CUDA", BROKEN, f"torch is built for CUDA {torch['cuda']}, but sees no GPU")
    else:
        yield _part("CUDA", OK, f"{torch['cuda']}, as torch is built")
        kernels, problem = _ask(_KERNELS)
        if kernels is not None and kernels["available"]:
            yield _part("GPU kernels", OK, "they can be built")
        else:
            yield _part("GPU kernels", BROKEN, kernels["warnings"] if kernels else problem)


def _gpu() -> Iterator[Part]:
    state, problem = MISSING, "there is no nvidia-smi"
    code, output = query_gpus("name,memory.total,compute_cap,driver_version")
    if code is not None:
        rows = [line.split(", ") for line in output.splitlines()]
        if code == 0 and rows and all(len(row) == 4 for row in rows):
            gpus = [f"{name} ({memory}, compute capability {cap})" for name, memory, cap, _ in rows]
            yield _part("GPU", OK, "; ".join(gpus))
            yield _part("driver", OK, rows[0][3])
            return
        state, problem = BROKEN, _last_line(code, output)
    yield _part("GPU", state, problem)
    yield _part("driver", state, problem)


def _mpi() -> Iterator[Part]:
    program = find_program("mpirun")
    if program is None:
        yield _part("MPI", MISSING, "there is no mpirun")
        return
    code, output = query([program, "--version"], _PROGRAM_S)
    if code == 0:
        yield _part("MPI", OK, output.partition("\n")[0])
    else:
        yield _part("MPI", BROKEN, _last_line(code, output))


def _package(name: str, distribution: str) -> Iterator[Part]:
    """Check a package whose metadata suffices."""
    version = installed_version(distribution)
    yield _part(name, OK, version) if version else _part(name, MISSING)


def _native(backend: Backend) -> Iterator[Part]:
    """Check TensorRT or TensorRT for RTX: its version, and the GPUs it compiles for."""
    if backend not in installed():
        yield _part(backend, MISSING)
        return
    package, problem = _ask(_NATIVE.format(backend))
    if package is None:
        yield _part(backend, BROKEN, problem)
    elif package["problem"]:
        yield _part(backend, UNSUITABLE, package["problem"])
    else:
        gpus = ", ".join(package["gpus"]) or "the GPU here"
        yield _part(backend, OK, f"{package['version']}, compiles for {gpus}")


def _tensorrt_llm() -> Iterator[Part]:
    version = installed_version(DISTRIBUTION)
    if version is None:
        yield _part(DISTRIBUTION, MISSING)
        return
    release_of(version)
    code, output = query(python_command(f"import {DISTRIBUTION}"), _IMPORT_S)
    if code == 0:
        yield _part(DISTRIBUTION, OK, f"{version}, with the engine backend")
    else:
        problem = f"{version}; importing it fails: {_last_line(code, output)}"
        yield _part(DISTRIBUTION, BROKEN, problem)


def _trtllm_build() -> Iterator[Part]:
    path = find_program(PROGRAM)
    version = builder_version(Path(path)) if path else None
    if path is None:
        yield _part(PROGRAM, MISSING, "not on PATH")
    elif version is None:
        yield _part(PROGRAM, BROKEN, f"{path} does not say which release it belongs to")
    else:
        release_of(version)
        yield _part(PROGRAM, OK, f"{version}, {path}")


def _disk() -> Iterator[Part]:
    directory = Path.cwd()
    free = shutil.disk_usage(directory).free
    text = f"{free / 10**9:,.1f} GB free in {directory}"
    yield _part("disk", OK if free >= _LITTLE_DISK else UNSUITABLE, text)


def _plugins() -> Iterator[Part]:
    candidates = [candidate for offers in registry.index().values() for candidate in offers]
    broken = []
    for candidate in candidates:
        try:
            candidate.load()
        except PluginError as error:
            broken.append(f"{candidate.qualified}: {error.message}")
    if broken:
        yield _part("plugins", BROKEN, "; ".join(broken))
    else:
        names = ", ".join(candidate.name for candidate in candidates)
        yield _part("plugins", OK if candidates else MISSING, names)


CHECKS: dict[str, Callable[[], Iterator[Part]]] = {
    "Python": _python,
    "torch": _torch,
    "GPU": _gpu,
    "MPI": _mpi,
    **{backend: partial(_native, backend) for backend in PACKAGES},
    DISTRIBUTION: _tensorrt_llm,
    PROGRAM: _trtllm_build,
    "modelopt": partial(_package, "modelopt", "nvidia-modelopt"),
    "datasets": partial(_package, "datasets", "datasets"),
    "rouge-score": partial(_package, "rouge-score", "rouge-score"),
    "disk": _disk,
    "plugins": _plugins,
}
"""In the order of the report."""


def _last_line(code: int, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with {code}"


def _ask(script: str) -> tuple[dict[str, Any] | None, str]:
    """Return the JSON object that a script prints last in a new process; or None and a problem."""
    code, output = query(python_command(script), _IMPORT_S)
    objects = re.findall(r"^\{.*\}$", output, re.MULTILINE)
    if code != 0 or not objects:
        return None, _last_line(code, output)
    answer: dict[str, Any] = json.loads(objects[-1])
    return answer, ""
