"""How much of its activation scale's range each linear uses on the prompts of the logits check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from phireg.dtypes import E4M3_MAX, INT8_MAX
from phireg.executor import ModelSpec
from phireg.executor.model import Source
from phireg.reader.tensors import layer_prefix
from phireg.verification.merge import merge

MOST, LEAST = 2.0, 1 / 16
"""Other inputs than those of the calibration differ, so only what is far from it is noted."""

_ENDS = {"fp8": E4M3_MAX, "int8_sq": INT8_MAX}


class Reach:
    """Watches the inputs of quantized linears.

    Args:
        spec: the checkpoint's.
        sources: the ranks' tensors by name.
    """

    def __init__(self, spec: ModelSpec, sources: Sequence[Source]) -> None:
        self.spec = spec
        self.sources = sources
        self.largest: dict[tuple[int, str], float] = {}
        self._end = _ENDS.get(spec.quantization.weights or "")

    def observe(self, layer: int, linear: str, x: Tensor) -> None:
        """Take a linear's input, before smoothing; see ``Executor.forward``."""
        if self._end is None:
            return
        if self.spec.quantization.weights == "int8_sq":
            x = x.float() * self._read(layer, f"{linear}.prequant_scaling_factor").to(x.device)
        scale = float(self._read(layer, f"{linear}.activation_scaling_factor"))
        reach = float(x.abs().amax()) / (scale * self._end)
        self.largest[layer, linear] = max(reach, self.largest.get((layer, linear), 0.0))

    def notes(self) -> Iterator[str]:
        """Linears whose inputs are cut off, or use next to nothing of the range."""
        beyond = {place: reach for place, reach in self.largest.items() if reach > MOST}
        below = {place: reach for place, reach in self.largest.items() if reach < LEAST}
        for found, pick, text in (
            (beyond, max, "are cut off: they reach {:.2g} times what its activation scale covers"),
            (below, min, "reach only {:.2g} of what its activation scale covers"),
        ):
            if found:
                layer, linear = pick(found, key=lambda place: found[place])
                more = f", and {len(found) - 1} more linears" if len(found) > 1 else ""
                yield f"inputs of layer {layer} {linear} {text.format(found[layer, linear])}{more}"

    def _read(self, layer: int, name: str) -> Tensor:
        whole = layer_prefix(layer) + name
        return merge(self.spec, whole, [source(whole).float() for source in self.sources])
