"""Where to compute, and how much memory that took."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from phireg.errors import UsageError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def pick_device(name: str) -> torch.device:
    """The device a user means.

    Args:
        name: "auto" (a GPU if there is one), "cpu", "cuda" (of several processes, each takes its
            own) or "cuda:N".

    Raises:
        UsageError: there is no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, number = (
        ("cuda" if gpus else "cpu").partition(":") if name == "auto" else (name.partition(":"))
    )
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind != "cuda" or not (number.isdecimal() or name in ("cuda", "auto")):
        raise UsageError(f"unknown device '{name}'", hint="known: auto, cpu, cuda, cuda:N.")
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= gpus:
        raise UsageError(
            f"there is no GPU {index}: torch {torch.__version__} sees {gpus}",
            hint="use --device cpu, or check the driver and CUDA_VISIBLE_DEVICES.",
        )
    return torch.device("cuda", index)


def measure_memory(device: torch.device) -> None:
    """Begin to measure the peak anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.init()  # there are no figures to reset before
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return  # then it is the peak since the process began


def peak_memory(device: torch.device) -> int:
    """Bytes at most since ``measure_memory``.

    On a GPU what torch allocated; else what this process had in main memory, with mapped files.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
