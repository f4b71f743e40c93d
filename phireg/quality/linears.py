"""What quantization does to the two factors of each linear's product."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from phireg.dtypes import E4M3_BEYOND
from phireg.executor.blocks import Weights
from phireg.executor.quantized import fake_quantize
from phireg.quality.result import LinearQuality
from phireg.reader.schemes import ROW_LINEARS

_ROWS = 1024


class LinearMeter:
    """Measures one linear of one layer: ``see`` inputs, then ``result``.

    Args:
        linear: its name in the layer.
        plain: each rank's unquantized tensors of the layer, in float32.
        quantized: each rank's tensors as the executor prepares them, in float32: weights on a grid
            are multiplied by their scales.
    """

    def __init__(self, linear: str, plain: list[Weights], quantized: list[Weights]) -> None:
        self._linear = linear
        self._plain = plain
        self._quantized = quantized
        self._scale = quantized[0].get(f"{linear}.activation_scaling_factor")
        smoothing = [ws.get(f"{linear}.prequant_scaling_factor") for ws in quantized]
        self._smoothing = [vector for vector in smoothing if vector is not None]
        self._noise = self._power = 0.0
        self._beyond = self._values = 0
        self._amax: Tensor | None = None

    def see(self, parts: list[Tensor]) -> None:
        """Take an input of the unquantized model: one of all ranks, or each rank's of a row linear.

        Args:
            parts: [..., in_features], in float32.
        """
        x = torch.cat(parts, dim=-1).flatten(0, -2)
        amax = x.abs().amax(0)
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
        if self._scale is None:
            return
        if self._smoothing:
            by_rank = self._linear in ROW_LINEARS
            x = x * torch.cat(self._smoothing if by_rank else self._smoothing[:1])
        steps = x / self._scale
        if self._smoothing:
            beyond = (steps.round() > 127) | (steps.round() < -128)
        else:
            beyond = steps.abs() >= E4M3_BEYOND
        self._beyond += int(beyond.sum())
        self._values += x.numel()
        there = fake_quantize(x, self._scale, "int8" if self._smoothing else "fp8")
        self._noise += _squares(there - x)
        self._power += _squares(x)

    def result(self, layer: int) -> LinearQuality:
        """The numbers of all inputs seen so far, and of the weight."""
        assert self._amax is not None
        inputs = self._scale is not None
        return LinearQuality(
            layer,
            self._linear,
            self._weight(),
            relative(self._noise, self._power) if inputs else None,
            self._beyond / self._values if inputs else None,
            _outliers(self._amax),
        )

    def _weight(self) -> float:
        noise = power = 0.0
        name = f"{self._linear}.weight"
        for rank, (plain, quantized) in enumerate(zip(self._plain, self._quantized, strict=True)):
            for before, after in zip(
                plain[name].split(_ROWS), quantized[name].split(_ROWS), strict=True
            ):
                wanted = before / self._smoothing[rank] if self._smoothing else before
                noise += _squares(after - wanted)
                power += _squares(wanted)
        return relative(noise, power)


def relative(noise: float, power: float) -> float:
    """The root of noise over power; nothing is right about noise where there should be nothing."""
    if noise == 0:
        return 0.0
    if power == 0 or not math.isfinite(noise):
        return math.inf
    return math.sqrt(noise / power)


def _squares(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _outliers(amax: Tensor) -> float:
    channels = amax.cpu().numpy()
    largest, median = float(channels.max()), float(np.median(channels))
    return largest / median if median > 0 else math.inf
