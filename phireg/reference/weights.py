"""The weights that transformers' own loader takes from a model directory.

Nothing here asks a plan, so a plan that took other files differs from this reading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from phireg.dtypes import torch_dtype
from phireg.errors import SourceError
from phireg.files.regular import listed
from phireg.source.adapter import WEIGHTS as ADAPTER_WEIGHTS
from phireg.source.adapter import Adapter, read_adapter
from phireg.source.model import FORMATS, INDEX, Reader, read_index, same_bytes
from phireg.source.tensors import SourceTensor, WeightsFile

_CPU, _BUFFER = torch.device("cpu"), 4 * 2**20

ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The names that ``from_pretrained`` looks for; the first that exists is loaded."""

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|language_model|base_model\.model)\."
)
"""Parts of names that torch.compile, DDP, FSDP, multimodal models and PEFT put in between."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of the files that are loaded, by their names without a wrapper's."""

    directory: Path
    name: str  # of the file or index
    files: tuple[WeightsFile, ...]
    tensors: Mapping[str, SourceTensor]
    adapter: Adapter | None = None  # whose layers are added to the model's parameters

    def open(self) -> Reader:
        """Return a reader for the tensors' bytes; use it in a ``with`` statement."""
        return Reader(self.directory, self.files)

    def read(
        self, reader: Reader, tensor: SourceTensor, device: torch.device = _CPU
    ) -> torch.Tensor:
        """Read a tensor's values, to a GPU through a small buffer in main memory."""
        values = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device=device)
        flat = values.view(-1).view(torch.uint8)
        if device.type == "cpu":
            reader.read_into(tensor, 0, memoryview(flat.numpy()))
            return values
        buffer = torch.empty(min(_BUFFER, tensor.nbytes), dtype=torch.uint8, pin_memory=True)
        for start in range(0, tensor.nbytes, _BUFFER):
            part = buffer[: tensor.nbytes - start]
            reader.read_into(tensor, start, memoryview(part.numpy()))
            flat[start : start + len(part)].copy_(part)
        return values

    def equal(self, left: SourceTensor, right: SourceTensor) -> bool:
        """Return whether two tensors have the same dtype, shape and bytes."""
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        with self.open() as reader:
            return same_bytes(reader, left, reader, right)


def find_weights(directory: Path, chosen: str | None = None, *, adapter: bool = False) -> Weights:
    """List the tensors that ``from_pretrained`` loads, or those of the file or index ``chosen``.

    An index none of whose shards exist is passed over. With ``adapter`` the LoRA adapter beside the
    weights is loaded, too, as transformers does where peft is installed.
    """
    names = (chosen,) if chosen is not None else ORDER
    for name in names:
        path = directory / name
        if chosen is None and not path.is_file():
            continue
        shards: tuple[str, ...] = (name,)
        absent: list[str] = []
        if name.endswith(INDEX):
            index = read_index(path)
            shards, absent = index.shards, index.missing
        if chosen is None and len(absent) == len(shards):
            continue
        if absent:
            raise SourceError(f"{path}: missing files: {listed(absent)}")
        files = tuple(FORMATS[Path(shard).suffix](directory, shard) for shard in shards)
        tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
        plain = {_WRAPPERS.sub("", key): tensor for key, tensor in tensors.items()}
        if len(plain) == len(tensors):
            tensors = plain
        if not adapter:
            return Weights(directory, name, files, tensors)
        lora = _find_adapter(directory)
        return Weights(directory, name, (*files, lora.file), {**tensors, **lora.saved}, lora)
    raise SourceError(f"{directory}: there are no weights that transformers loads")


def _find_adapter(directory: Path) -> Adapter:
    for name in ADAPTER_WEIGHTS:
        if (directory / name).is_file():
            adapter = read_adapter(directory, name)
            if adapter.problems:
                raise SourceError(f"{directory / name} is not applied: {adapter.problems[0]}")
            return adapter
    raise SourceError(f"{directory}: there is no {ADAPTER_WEIGHTS[0]}")
