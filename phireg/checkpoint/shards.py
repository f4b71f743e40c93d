"""The weight files of a Hugging Face directory, as one collection of tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.checkpoint.rankfiles import Bits, RankFile
from phireg.errors import CheckError, SourceError
from phireg.files.json import read_json_object
from phireg.files.kinds import HF_MODEL, MANIFEST, check_kind, kind_of
from phireg.files.regular import bullets
from phireg.reader.layouts import SIDECAR, is_quantized
from phireg.reader.modules import Directory, parse_directory
from phireg.reader.tensors import Kind
from phireg.source.model import INDEX, read_index, shard_defects

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE = "model.safetensors"
SURPLUS = "does not belong to the model, and some readers would take it"


def read_directory(directory: Path) -> Directory:
    """Read config.json and the sidecar of a directory; CheckError for what has no exact meaning."""
    check_kind(directory, HF_MODEL)
    path = directory / "config.json"
    return parse_directory(read_json_object(path), _sidecar(directory), str(path))


def has_quantized_layout(directory: Path) -> bool:
    """Return whether this is a Hugging Face directory, quantized in a layout that is known."""
    if kind_of(directory) is not HF_MODEL:
        return False
    return is_quantized(read_json_object(directory / "config.json"), _sidecar(directory))


def is_executed(directory: Path) -> bool:
    """Return whether the executor runs a Hugging Face directory: a quantized one, or phireg's."""
    written = kind_of(directory) is HF_MODEL and (directory / MANIFEST).exists()
    return written or has_quantized_layout(directory)


def _sidecar(directory: Path) -> dict[str, Any] | None:
    path = directory / SIDECAR
    return read_json_object(path) if path.exists() else None


class Shards(AbstractContextManager["Shards"]):
    """The open safetensors files of a directory; a context manager that closes them.

    ``defects`` tell of shards that are damaged, missing or not what their index says; they make the
    CheckError ``refusal``, raised if ``strict``. Raises a SourceError where there are none.
    """

    def __init__(self, directory: Path, *, strict: bool = True) -> None:
        index_path = directory / f"{_WHOLE}{INDEX}"
        index = read_index(index_path) if index_path.exists() else None
        lacks = index is None and not (directory / _WHOLE).exists()
        if lacks and not (directory / MANIFEST).exists():
            raise SourceError(
                f"{directory} has no {_WHOLE} and no {index_path.name}",
                hint="download or export the model again",
            )
        self._directory, self._indexed = directory, index is not None
        self.names = (_WHOLE,) if index is None else index.shards
        self.files = {}
        defects = [] if index is None else [f"{name} is missing" for name in index.missing]
        errors: list[SourceError] = []
        for name in self.names:
            if index is None or name not in index.missing:
                try:
                    self.files[name] = RankFile(directory / name)
                except SourceError as error:
                    errors.append(error)
        if index is not None:
            held = {name: file.header.entries.keys() for name, file in self.files.items()}
            defects += shard_defects(index, held)
        self.defects: list[str] = []
        self.refusal: CheckError | None = None
        if errors or defects:
            hints = {error.hint for error in errors}
            hint = hints.pop() if len(hints) == 1 and not defects else None
            self.defects = [*(error.message for error in errors), *defects]
            self.refusal = CheckError(
                f"{directory}: the weight files cannot be used:{bullets(self.defects, 20)}",
                hint=hint or "download or export the model again; all files must be of one export",
            )
            if strict:
                self.close()
                raise self.refusal
        self._of = {name: file for file in self.files.values() for name in file.header.entries}
        self._mapped: dict[Path, Callable[[str], Tensor]] = {}

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; mapped tensors stay valid."""
        for file in self.files.values():
            file.close()

    def surplus(self) -> list[str]:
        """Return files that some readers would take besides or instead of these.

        Without an index vLLM and SGLang read every safetensors file; transformers prefers
        model.safetensors to an index.
        """
        pattern = _WHOLE if self._indexed else "*.safetensors"
        found = {path.name for path in self._directory.glob(pattern)}
        return sorted(found - set(self.names))

    def kinds(self) -> dict[str, Kind]:
        """Return dtype code and shape of every tensor."""
        return {name: kind for file in self.files.values() for name, kind in file.kinds().items()}

    def shard(self, name: str) -> str:
        """Return the name of the file that has a tensor."""
        return self._of[name].path.name

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def read(self, name: str) -> Bits:
        """Read a whole tensor as bits."""
        return self._of[name].read(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that lies in its mapped file until it is copied."""
        file = self._of[name]
        if file.path not in self._mapped:
            self._mapped[file.path] = file.mapped()
        return self._mapped[file.path](name)
