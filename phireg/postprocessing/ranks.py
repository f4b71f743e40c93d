"""The rank files of one checkpoint, open for reading."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from phireg.errors import SourceError
from phireg.files.regular import Stamp, check_unchanged, open_regular, read_into
from phireg.files.safetensors import Header, TensorEntry, read_header

_MOST_RANKS = 4096


class Ranks:
    """The rank files a config.json asks for, held open; a context manager.

    They are opened once, so what is read later is what was looked at first, even if another
    directory takes the checkpoint's name in the meantime.

    Args:
        directory: the checkpoint.
        config: its config.json.

    Raises:
        SourceError: a file is missing or damaged, or the config asks for no possible number.
    """

    def __init__(self, directory: Path, config: Mapping[str, object]) -> None:
        self.paths = [directory / f"rank{n}.safetensors" for n in range(_world_size(config))]
        self.headers: list[Header] = []
        self._files: list[int] = []
        self._stack = ExitStack()
        with ExitStack() as stack:
            for path in self.paths:
                if not path.exists() and self.headers:
                    raise SourceError(
                        f"{path}: no such file, and config.json says {len(self.paths)} ranks",
                        hint="modelopt before 0.13 wrote one file for Phi-3-small whatever the TP "
                        "size, which no reader divides; quantize again, with phireg quantize or "
                        "with TP 1.",
                    )
                header = read_header(path)
                descriptor = open_regular(path)
                stack.callback(os.close, descriptor)
                check_unchanged(descriptor, path, Stamp(header.file_size, header.mtime_ns))
                self.headers.append(header)
                self._files.append(descriptor)
            self._stack = stack.pop_all()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return len(self.paths)

    def companions(self, rank: int, target: str) -> dict[str, TensorEntry]:
        """The tensors of a module, by the last component of their names."""
        return {
            name.removeprefix(f"{target}."): entry
            for name, entry in self.headers[rank].entries.items()
            if name.startswith(f"{target}.")
        }

    def read(self, rank: int, offset: int, count: int) -> bytearray:
        """``count`` bytes of a file from ``offset`` on.

        Raises:
            SourceError: the file changed, or could not be read.
        """
        buffer = bytearray(count)
        read_into(self._files[rank], self.paths[rank], offset, memoryview(buffer))
        header = self.headers[rank]
        check_unchanged(
            self._files[rank], self.paths[rank], Stamp(header.file_size, header.mtime_ns)
        )
        return buffer


def _world_size(config: Mapping[str, object]) -> int:
    mapping = config.get("mapping")
    mapping = mapping if isinstance(mapping, Mapping) else {}
    world, tp = mapping.get("world_size", 1), mapping.get("tp_size", mapping.get("world_size", 1))
    if type(world) is not int or not 0 < world <= _MOST_RANKS:
        raise SourceError(f"config.json: mapping.world_size is {world!r}")
    if tp != world:
        raise SourceError(
            f"config.json: mapping.world_size is {world} and tp_size {tp!r}; "
            "no Phi model has another kind of parallelism"
        )
    return world
