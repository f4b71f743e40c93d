"""A safetensors file as tensors in mapped memory, however large the file is."""

from __future__ import annotations

import json
import mmap
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_MAP_NORESERVE = 0x4000  # Linux's; Python 3.12 has no name for it
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedFile:
    """One mapped file.

    ``safe_open`` maps a file for torch writably, and Linux then wants memory for all of it, should
    every page be written to: a file larger than memory and swap is refused. Nothing is reserved
    here; writing to a tensor still changes this process's copy of a page and never the file.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
        SafetensorError: its header is damaged, or names a dtype that torch lacks.
    """

    def __init__(self, path: Path) -> None:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            raise OSError(f"{path.name} is not a file")
        with safe_open(path, framework="numpy"):
            pass  # its header is as it must be
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            self._data = mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        header.pop("__metadata__", None)
        self._entries = header
        self._start = 8 + length
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise SafetensorError(f"{name} is {entry['dtype']}")

    def keys(self) -> Collection[str]:
        """The names of the tensors."""
        return self._entries.keys()

    def get_tensor(self, name: str) -> Tensor:
        """A tensor, where it is mapped."""
        entry = self._entries[name]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        start, end = entry["data_offsets"]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(
            self._data, dtype=torch.uint8, count=end - start, offset=self._start + start
        )
        return raw.view(dtype).reshape(shape)
