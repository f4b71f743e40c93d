"""Observe the inputs of quantized linears and caches, against what their scales cover."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from phireg.dtypes import E4M3_MAX
from phireg.executor import Executor, blocks
from phireg.executor.directories import DirectorySource
from phireg.executor.sources import Source
from phireg.formats import FORMATS, LARGEST, Inputs
from phireg.reader.schemes import SCHEMES
from phireg.reader.tensors import layer_prefix
from phireg.verification.ranks import merge
from phireg.verification.result import Problem

_MOST_RANGE, _LEAST_RANGE = 2.0, 1 / 16
"""Inputs differ from those of the calibration, so only ranges far from it are noted."""


class ActivationRanges:
    """Observes the inputs of quantized linears."""

    def __init__(self, executor: Executor, sources: Sequence[Source]) -> None:
        self.spec = executor.spec
        self.executor = executor
        self.sources = sources
        self.used: dict[tuple[int, str], float] = {}
        self.cached: dict[int, tuple[float, float]] = {}  # largest key and value by layer

    def observe(self, layer: int, linear: str, x: Tensor) -> None:
        """Take a linear's input, before smoothing; see ``Executor.forward``."""
        for inputs, scale, smoothing in self._calibrated(layer, linear):
            factors = 1 if smoothing is None else smoothing.float().to(x.device)
            largest = scale * LARGEST[inputs.grid]
            if inputs.scale == "group":  # times the scale of a group
                largest *= LARGEST["e4m3"]
            used = float((x.float() * factors).abs().amax()) / largest
            self.used[layer, linear] = max(used, self.used.get((layer, linear), 0.0))
        cached = linear == "attention.qkv" and self.spec.quantization.kv_cache is not None
        if cached and isinstance(self.sources[0], DirectorySource):
            self._observe_cache(layer, x)

    def _calibrated(self, layer: int, linear: str) -> Iterator[tuple[Inputs, float, Tensor | None]]:
        """Yield what becomes of a linear's inputs, their scale and smoothing, if it has a scale."""
        (source, *_) = self.sources
        if isinstance(source, DirectorySource):
            for same in zip(*source.stored(layer, linear), strict=True):
                scales = [float(part.scale) for part in same if part.scale is not None]
                if same[0].inputs is not None and scales:
                    # An expert's own inputs are not told apart here: none exceeds the widest range.
                    yield same[0].inputs, max(scales), same[0].smoothing
            return
        scheme = SCHEMES.get(self.spec.quantization.weights or "")
        if scheme is not None and (form := FORMATS[scheme.qformat]).inputs is not None:
            scale = float(self._read(layer, f"{linear}.activation_scaling_factor"))
            name = f"{linear}.prequant_scaling_factor"
            yield form.inputs, scale, None if form.smoothing is None else self._read(layer, name)

    def notes(self) -> Iterator[str]:
        """Yield notes on inputs that are cut off, or that use next to nothing of the range."""
        beyond = {place: used for place, used in self.used.items() if used > _MOST_RANGE}
        below = {place: used for place, used in self.used.items() if used < _LEAST_RANGE}
        for linears, pick, text in (
            (beyond, max, "are cut off: they reach {:.2g} times what its activation scale covers"),
            (below, min, "reach only {:.2g} of what its activation scale covers"),
        ):
            if linears:
                layer, linear = pick(linears, key=lambda place: linears[place])
                more = f", and {len(linears) - 1} more linears" if len(linears) > 1 else ""
                text = text.format(linears[layer, linear])
                yield f"inputs of layer {layer} {linear} {text}{more}"

    def _observe_cache(self, layer: int, x: Tensor) -> None:
        spec, size = self.spec, self.spec.head_size
        (weights,) = self.executor.layer_weights(layer)
        parts = blocks.linear(weights, "attention.qkv", x).split(
            [heads * size for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)], -1
        )
        before = self.cached.get(layer, (0.0, 0.0))
        key, value = (float(part.abs().amax()) for part in parts[1:])
        self.cached[layer] = max(before[0], key), max(before[1], value)

    def exchanged(self) -> Iterator[Problem]:
        """Yield layers whose scales of keys and values fit each other's range, not their own."""
        (source, *_) = self.sources
        if not isinstance(source, DirectorySource):
            return
        for layer, largest in self.cached.items():
            names = source.directory.cache_scales(layer)
            ends = [float(source.shards.tensor(names[what])) * E4M3_MAX for what in "kv"]
            own, other = (
                max(abs(math.log2(max(used, 1e-30) / end)) for used, end in pairs)
                for pairs in (
                    list(zip(largest, ends, strict=True)),
                    list(zip(largest, reversed(ends), strict=True)),
                )
            )
            if own > other + 1:
                text = (
                    f"covers keys up to {ends[0]:.4g} and values up to {ends[1]:.4g}; they reach "
                    f"{largest[0]:.4g} and {largest[1]:.4g}: the two scales are exchanged"
                )
                yield Problem(names["k"], text, None, layer, "attention")

    def _read(self, layer: int, name: str) -> Tensor:
        whole = layer_prefix(layer) + name
        return merge(self.spec, whole, [source(whole).float() for source in self.sources])
