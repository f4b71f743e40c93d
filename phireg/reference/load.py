"""The source's own model: transformers' class, or the one that the family ships.

Its weights are read from the source's files as data. A reference keeps all of them, or has one
decoder layer's in memory at a time; what it computes is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phireg.family import Family
from phireg.reference.build import build
from phireg.reference.hooks import Watcher, watched
from phireg.reference.parameters import Parameters
from phireg.source.source import Source

_LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference, its weights not read yet: call ``keep_all`` or ``keep_ends``, or read layers.

    Attributes:
        model: a transformers-compatible causal language model in evaluation mode, whose decoder
            layers are ``model.model.layers``.
        notes: what was set differently from the source's config.json, and why.
        parameters: the weights of ``model``.
    """

    model: Any
    notes: tuple[str, ...]
    parameters: Parameters

    def keep_all(self) -> None:
        """Read all weights and keep them."""
        self.parameters.fill(self.parameters.names())

    def keep_ends(self) -> None:
        """Read embedding, final norm and lm_head; every forward pass reads each layer anew."""
        self.parameters.fill(self._ends())
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(self._reading(index))
            layer.register_forward_hook(self._releasing(index))

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """A decoder layer, whose weights are in memory inside the ``with`` statement only."""
        names = self._layer(index)
        self.parameters.fill(names)
        try:
            yield self.model.model.layers[index]
        finally:
            self.parameters.release(names)

    @property
    def nbytes(self) -> int:
        """Memory of all weights."""
        return self.parameters.nbytes(self.parameters.names())

    @property
    def streamed_nbytes(self) -> int:
        """Memory of the weights when only the ends are kept: theirs and the largest layer's."""
        layers = range(len(self.model.model.layers))
        largest = max((self.parameters.nbytes(self._layer(index)) for index in layers), default=0)
        return self.parameters.nbytes(self._ends()) + largest

    def logits(self, ids: Tensor, watcher: Watcher) -> Tensor:
        """Float32 logits [batch, tokens, vocab_size] of ``ids`` without a cache."""
        with torch.no_grad(), watched(self.model, watcher):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def _layer(self, index: int) -> list[str]:
        return self.parameters.names(f"{_LAYERS}{index}.")

    def _ends(self) -> list[str]:
        return [name for name in self.parameters.names() if not name.startswith(_LAYERS)]

    def _reading(self, index: int) -> Callable[..., None]:
        return lambda *_: self.parameters.fill(self._layer(index))

    def _releasing(self, index: int) -> Callable[..., None]:
        return lambda *_: self.parameters.release(self._layer(index))


def open_reference(
    family: Family,
    source: Source,
    *,
    weights: torch.dtype | None,
    dtype: torch.dtype,
    device: torch.device,
    exact: Collection[str] = (),
) -> Reference:
    """Build the source's model without reading its weights.

    Args:
        family: names the model class where transformers has none.
        source: the files.
        weights: dtype that the source's values are rounded to first, as a conversion rounds them;
            what then differs from a checkpoint in that dtype is arithmetic, not rounding. None:
            they are not.
        dtype: compute dtype.
        device: where to compute.
        exact: names of source tensors that a conversion does not round, whatever ``weights`` is.

    Raises:
        SourceError: no model class on this machine reads the source.
    """
    model, notes = build(family, source.directory, dtype)
    parameters = Parameters(model, source, weights, device, exact)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Moved and not cast: rotary tables are float32 whatever the compute dtype is.
            module._buffers[name] = buffer.to(device)
    return Reference(model, notes, parameters)
