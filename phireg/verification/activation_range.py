"""Measure how much of its activation scale's range each linear uses on the prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from phireg.dtypes import E4M3_MAX, INT8_MAX
from phireg.executor import ModelSpec
from phireg.executor.model import Source
from phireg.reader.tensors import layer_prefix
from phireg.verification.ranks import merge

_MOST, _LEAST = 2.0, 1 / 16
"""Inputs differ from those of the calibration, so only ranges far from it are noted."""

_LARGEST = {"fp8": E4M3_MAX, "int8_sq": INT8_MAX}


class ActivationRanges:
    """Observes the inputs of quantized linears."""

    def __init__(self, spec: ModelSpec, sources: Sequence[Source]) -> None:
        self.spec = spec
        self.sources = sources
        self.used: dict[tuple[int, str], float] = {}

    def observe(self, layer: int, linear: str, x: Tensor) -> None:
        """Take a linear's input, before smoothing; see ``Executor.forward``."""
        scheme = self.spec.quantization.weights
        if scheme is None:
            return
        if scheme == "int8_sq":
            x = x.float() * self._read(layer, f"{linear}.prequant_scaling_factor").to(x.device)
        scale = float(self._read(layer, f"{linear}.activation_scaling_factor"))
        used = float(x.abs().amax()) / (scale * _LARGEST[scheme])
        self.used[layer, linear] = max(used, self.used.get((layer, linear), 0.0))

    def notes(self) -> Iterator[str]:
        """Yield notes on inputs that are cut off, or that use next to nothing of the range."""
        beyond = {place: used for place, used in self.used.items() if used > _MOST}
        below = {place: used for place, used in self.used.items() if used < _LEAST}
        for linears, pick, text in (
            (beyond, max, "are cut off: they reach {:.2g} times what its activation scale covers"),
            (below, min, "reach only {:.2g} of what its activation scale covers"),
        ):
            if linears:
                layer, linear = pick(linears, key=lambda place: linears[place])
                more = f", and {len(linears) - 1} more linears" if len(linears) > 1 else ""
                text = text.format(linears[layer, linear])
                yield f"inputs of layer {layer} {linear} {text}{more}"

    def _read(self, layer: int, name: str) -> Tensor:
        whole = layer_prefix(layer) + name
        return merge(self.spec, whole, [source(whole).float() for source in self.sources])
