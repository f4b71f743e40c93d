"""A model's parameters, read from the source's files on demand."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from phireg.dtypes import WEIGHT_DTYPES, torch_dtype
from phireg.errors import SourceError
from phireg.source.model import Reader, Source
from phireg.source.tensors import SourceTensor

_FLOATS = {*WEIGHT_DTYPES.values(), "F64"}


class Parameters:
    """Fills and empties the parameters of a model that was built without them.

    Values are rounded to ``rounded`` on their way to the parameters' dtype, except those of the
    source tensors named in ``exact``.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        rounded: torch.dtype | None,
        device: torch.device,
        exact: Collection[str] = (),
    ) -> None:
        self._source = source
        self._rounded = rounded
        self._device = device
        self._exact = exact
        tied = _tied(model)
        self._places: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        self._tensors: dict[str, SourceTensor] = {}
        absent, wrong = [], []
        for prefix, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}"
                self._places[name] = module, leaf, parameter
                tensor = source.tensors.get(tied.get(name, name))
                if tensor is None:
                    absent.append(name)
                elif tensor.shape != tuple(parameter.shape) or tensor.dtype not in _FLOATS:
                    shape = f"{tensor.dtype} {list(tensor.shape)}, not {list(parameter.shape)}"
                    wrong.append(f"{name} is {shape}")
                else:
                    self._tensors[name] = tensor
        if absent:
            raise SourceError(f"the reference model does not find {', '.join(absent[:5])}")
        if wrong:
            raise SourceError(f"the reference model cannot take {'; '.join(wrong[:5])}")

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the parameters that begin with a prefix."""
        return [name for name in self._places if name.startswith(prefix)]

    def nbytes(self, names: Collection[str]) -> int:
        """Return the memory that these parameters take when filled, tied ones once."""
        places = {self._tensors[name].name: self._places[name][2] for name in names}
        return sum(parameter.numel() * parameter.itemsize for parameter in places.values())

    def fill(self, names: Collection[str]) -> None:
        """Read parameters; tied ones that are filled together share their memory."""
        read: dict[str, nn.Parameter] = {}
        with self._source.open() as reader:
            for name in names:
                module, leaf, empty = self._places[name]
                tensor = self._tensors[name]
                if tensor.name not in read:
                    values = self._read(reader, tensor).to(empty.dtype)
                    read[tensor.name] = nn.Parameter(values, requires_grad=False)
                setattr(module, leaf, read[tensor.name])

    def release(self, names: Collection[str]) -> None:
        """Free the memory of parameters."""
        for name in names:
            module, leaf, empty = self._places[name]
            setattr(module, leaf, empty)

    def _read(self, reader: Reader, tensor: SourceTensor) -> Tensor:
        """Read a tensor's values to the device, rounded unless it is exact."""
        values = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
        reader.read_into(tensor, 0, memoryview(values.view(-1).view(torch.uint8).numpy()))
        values = values.to(self._device)
        if self._rounded is None or tensor.name in self._exact:
            return values
        return values.to(self._rounded)


def _tied(model: Any) -> dict[str, str]:
    """Map the name of a tied parameter to the name of the one it repeats."""
    if not model.config.tie_word_embeddings:
        return {}
    names = {module: name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {f"{names[head]}.weight": f"{names[embedding]}.weight"}
