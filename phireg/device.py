"""The device to compute on, and the peak of its memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from phireg.errors import UsageError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def pick_device(name: str) -> torch.device:
    """Choose the device to compute on.

    The names are "auto" (a GPU if there is one), "cpu", "cuda" (each of several local processes
    takes its own) and "cuda:N".
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
    kind, _, number = name.partition(":")
    if name == "auto":
        kind = "cuda" if gpus else "cpu"
    if kind == "cpu" and ":" not in name:
        return torch.device("cpu")
    if kind != "cuda" or not (number.isdecimal() or name in ("cuda", "auto")):
        raise UsageError(
            f"unknown device '{name}'",
            hint=f"known: auto, cpu, cuda, cuda:N; available here: {available}.",
        )
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= gpus:
        raise UsageError(
            f"there is no GPU {index}: torch {torch.__version__} sees {gpus}",
            hint=f"available here: {available}; check the driver and CUDA_VISIBLE_DEVICES.",
        )
    return torch.device("cuda", index)


@contextmanager
def within_memory(device: torch.device, advice: str) -> Iterator[None]:
    """Explain that what runs inside, or CUDA itself, does not fit into the memory of a GPU."""
    try:
        yield
    except RuntimeError as error:
        if device.type == "cpu" or "out of memory" not in str(error):
            raise
        raise UsageError(f"the memory of {device} is too small, or in use", hint=advice) from None


def measure_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory` reports, where the system can."""
    if device.type == "cuda":
        torch.cuda.init()  # before this there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return  # the peak then counts from the start of the process


def return_memory(device: torch.device) -> None:
    """Give the memory of a GPU that no tensor uses back, for other programs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes since ``measure_memory``: torch's on a GPU, else all of it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
