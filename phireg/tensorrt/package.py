"""The installed TensorRT packages: which one to take, and a log that lets no error pass.

TensorRT and TensorRT for RTX have the same network API under two module names. Neither raises
anything when it refuses a layer or a setting: the layer is None, or the setting is not made, and
the reason is only logged. So each package gets one logger, and ``Log.check`` turns what it heard
into an EngineError.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

from phireg.errors import EngineError, SourceError
from phireg.files.regular import open_file

Backend: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]

DISTRIBUTIONS: dict[Backend, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_cu13", "tensorrt_cu13_bindings", "tensorrt_cu12"),
    "tensorrt-rtx": ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings", "tensorrt_rtx"),
}
"""By backend, the distributions that may hold it; in the order in which ``auto`` tries them."""

INSTALL: dict[Backend, str] = {
    "tensorrt": "pip install 'phireg[tensorrt]' --extra-index-url https://pypi.nvidia.com",
    "tensorrt-rtx": "pip install 'phireg[rtx]'",
}
NAMES: dict[Backend, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}

# Methods without which a package is too old.
_LAYERS = ("add_attention_v2", "add_kv_cache_update", "add_rotary_embedding")


class Log:
    """Everything a package said in this process, to ``listen``, too; ``check`` raises errors."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.listen: Callable[[str], None] | None = None
        self._errors: list[str] = []

    def add(self, severity: str, text: str) -> None:
        """Keep a message; one that is an error is raised by the next ``check``."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(text)
        if self.listen is not None:
            self.listen(f"[{severity}] {text}")

    def clear(self) -> None:
        """Forget the errors since the last check: they are told in another way."""
        self._errors = []

    def check(self, doing: str, *, failed: bool = False) -> None:
        """Raise an EngineError if the package logged an error, or it ``failed`` without one."""
        errors, self._errors = self._errors, []
        if errors or failed:
            reason = " ".join(errors[0].split()) if errors else "it gave no reason"
            raise EngineError(
                f"{self.name} refused {doing}: {reason}",
                hint="docs/engines.md says what is known not to work, and what to report.",
            )


@dataclass(frozen=True, slots=True)
class Package:
    """An installed TensorRT: its module, which has the whole API, and its log."""

    backend: Backend
    version: str
    trt: Any
    log: Log
    logger: Any  # the package's ILogger

    @property
    def name(self) -> str:
        """The name and version to show."""
        return f"{NAMES[self.backend]} {self.version}"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities it compiles for ("sm89"); empty if only for the GPU at hand."""
        known = getattr(self.trt, "ComputeCapability", None)
        if known is None or not hasattr(self.trt.IBuilderConfig, "set_compute_capability"):
            return ()
        names = (name.lower() for name in known.__members__ if name.startswith("SM"))
        return tuple(sorted(names, key=lambda name: int(name[2:])))


def installed() -> dict[Backend, str]:
    """Return the installed backends and their versions, from metadata alone."""
    versions: dict[Backend, str] = {}
    for backend, distributions in DISTRIBUTIONS.items():
        for distribution in reversed(distributions):  # the first that is there counts
            with suppress(metadata.PackageNotFoundError):
                versions[backend] = metadata.version(distribution)
    return versions


@functools.cache
def load_package(backend: Backend) -> Package:
    """Import a backend, or raise an EngineError; it has one logger per process."""
    trt = _import(backend)
    missing = [name for name in _LAYERS if not hasattr(trt.INetworkDefinition, name)]
    if missing:
        raise EngineError(
            f"{NAMES[backend]} {trt.__version__} is too old: it has no {missing[0]}",
            hint=f"install a newer one: {INSTALL[backend]}",
        )
    log = Log(f"{NAMES[backend]} {trt.__version__}")

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity != trt.ILogger.VERBOSE:
                log.add(severity.name, message)

    return Package(backend, trt.__version__, trt, log, Logger())


def load_engine(package: Package, path: Path) -> tuple[Any, Any]:
    """Return a package's runtime and the engine that it reads from a file; both must be kept."""
    trt = package.trt
    runtime = trt.Runtime(package.logger)
    problems: list[str] = []
    with open_file(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise SourceError(f"{path} is empty", hint="build the engine again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if hasattr(runtime, "get_engine_validity"):  # TensorRT for RTX has it
                validity, bits = runtime.get_engine_validity(data)
                if validity == trt.EngineValidity.INVALID:
                    known = trt.EngineInvalidityDiagnostics.__members__.items()
                    problems = [name.lower() for name, bit in known if bits & int(bit)]
                    problems = problems or ["it gave no reason"]
            engine = None if problems else runtime.deserialize_cuda_engine(data)
    if problems:
        package.log.clear()
        reasons = ", ".join(problems).replace("_", " ")
        raise EngineError(f"{package.name} cannot load {path}: {reasons}")
    package.log.check(f"to load {path}", failed=engine is None)
    return runtime, engine


def _import(backend: Backend) -> Any:
    if backend not in installed():
        raise EngineError(
            f"{NAMES[backend]} is not installed",
            hint=f"{INSTALL[backend]}; phireg doctor says what else is there.",
        )
    try:
        if backend == "tensorrt":
            import tensorrt

            return tensorrt
        # The wheels of phireg[rtx]; the metapackage tensorrt_rtx only imports them.
        import tensorrt_rtx_bindings

        return tensorrt_rtx_bindings
    except Exception as error:  # a missing library, or one of another CUDA
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(
            f"{NAMES[backend]} cannot be imported: {reason}",
            hint=f"install it again: {INSTALL[backend]}",
        ) from error
