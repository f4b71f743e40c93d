"""Run two executors side by side, one layer of each in memory at a time, and measure the layers.

What is compared in a linear are the two factors of its product, the weight and the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phireg.dtypes import E4M3_BEYOND
from phireg.executor import Executor
from phireg.executor.blocks import Weights
from phireg.executor.finite import check_logits, rows_named
from phireg.executor.quantized import fake_quantize, rounded_inputs, weight_values
from phireg.quality.estimates import mean, share
from phireg.quality.result import LinearQuality
from phireg.reader.schemes import LINEARS, ROW_LINEARS, Grid
from phireg.verification.logits import Layer, divergences

_ROWS = 1024


def compare_layers(
    plain: Executor,
    quantized: Executor,
    rows: Sequence[Sequence[int]],
    progress: Callable[[int], None],
) -> tuple[tuple[LinearQuality, ...], tuple[float, ...], dict[str, Any]]:
    """Run both on all rows, layer by layer.

    Return the linears, the hidden states' errors, and what ``TextQuality`` has of the logits.

    Both must compute in float32, on the same device. Between layers only the hidden states of all
    rows are in memory; at the end also the logits of one of the two.
    """
    with torch.no_grad():
        ids = [torch.tensor([list(row)], device=plain.device) for row in rows]
        states, quantized_states = (
            [executor.embed(executor.end_weights(), row) for row in ids]
            for executor in (plain, quantized)
        )
        linears: list[LinearQuality] = []
        hidden = []
        for index in range(plain.spec.num_layers):
            before, after = Layer(plain, index), Layer(quantized, index)
            meters = {
                name: LinearMeter(name, before.weights, after.weights, _folded(name, before, after))
                for name in LINEARS
            }

            def observe(
                linear: str, parts: list[Tensor], meters: dict[str, LinearMeter] = meters
            ) -> None:
                meters[linear].observe(parts)

            states = [before.run(x, observe_inputs=observe) for x in states]
            quantized_states = list(map(after.run, quantized_states))
            del before, after
            linears += [meter.result(index) for meter in meters.values()]
            meters.clear()  # of two layers, one is in memory at a time
            errors = map(_token_errors, quantized_states, states)
            hidden.append(float(torch.cat(list(errors)).mean()))
            progress(1)
        logits = _compare_logits(plain, quantized, ids, states, quantized_states)
        return tuple(linears), tuple(hidden), logits


def _folded(linear: str, plain: Layer, quantized: Layer) -> Tensor | None:
    """Return the factors of a linear's inputs that the quantized model's norm has taken over."""
    norm = "input_layernorm.weight"
    if linear == "mlp.fc" and "post_layernorm.weight" in plain.weights[0]:
        norm = "post_layernorm.weight"
    before, after = plain.weights[0][norm].float(), quantized.weights[0][norm].float()
    if linear in ROW_LINEARS or torch.equal(before, after):
        return None
    return after / before


def _token_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Compute each token's error relative to itself, float32 [tokens]."""
    # Some models have a few tokens a thousand times as large; beside them no other would count.
    norm = expected[0].norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (actual - expected)[0].norm(dim=-1) / norm


def _compare_logits(
    plain: Executor,
    quantized: Executor,
    ids: Sequence[Tensor],
    states: Sequence[Tensor],
    quantized_states: Sequence[Tensor],
) -> dict[str, Any]:
    ends = plain.end_weights()
    expected = [plain.logits(ends, x)[0] for x in states]
    with rows_named([f"the unquantized model, sample {n}" for n in range(1, len(ids) + 1)]):
        for index, logits in enumerate(expected):
            check_logits(logits, index, 0, "float32")
    ends = quantized.end_weights()
    by_row = []
    rows = zip(ids, expected, quantized_states, strict=True)
    for number, (row, before, x) in enumerate(rows, 1):
        after = quantized.logits(ends, x)[0]
        with rows_named([f"the quantized model, sample {number}"]):
            check_logits(after, 0, 0, "float32")
        same = before.argmax(-1) == after.argmax(-1)
        measured = (same, divergences(after, before), _nll(before, row[0]), _nll(after, row[0]))
        by_row.append([values.cpu().numpy() for values in measured])
    same_rows, kl, before_nll, after_nll = zip(*by_row, strict=True)
    return {
        "top1": share(same_rows),
        "kl": mean(kl),
        "nll": mean(after_nll).value,
        "unquantized_nll": mean(before_nll).value,
        "nll_change": mean([a - b for a, b in zip(after_nll, before_nll, strict=True)]),
    }


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute the negative log likelihoods of all tokens but the first."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


class LinearMeter:
    """Measures one linear of one layer, by the weights that the executor prepares in float32."""

    def __init__(
        self,
        linear: str,
        plain: list[Weights],
        quantized: list[Weights],
        folded: Tensor | None = None,
    ) -> None:
        """Measure ``linear``; ``folded`` are factors of its inputs that the norm before has."""
        self._linear = linear
        self._plain = plain
        self._quantized = quantized
        self._smoothing = [
            vector
            for ws in quantized
            for part in ("prequant_scaling_factor", "smoothing")
            if (vector := ws.get(f"{linear}.{part}")) is not None
        ]
        self._own = bool(self._smoothing)
        if folded is not None:
            self._smoothing = [folded] * len(quantized)
        usual: Grid = "int8" if f"{linear}.prequant_scaling_factor" in quantized[0] else "fp8"
        static: dict[str, Grid] = {
            "activation_scaling_factor": usual,
            "inputs_e4m3_tensor": "fp8",
            "inputs_int8_tensor": "int8",
        }
        self._scale: Tensor | None = None
        self._grid = usual
        for part, grid in static.items():
            if self._scale is None and f"{linear}.{part}" in quantized[0]:
                self._scale, self._grid = quantized[0][f"{linear}.{part}"], grid
        self._dynamic = any(name.startswith(f"{linear}.inputs_") for name in quantized[0])
        self._noise = self._power = 0.0
        self._beyond = self._values = 0
        self._amax = torch.zeros(())

    def observe(self, parts: list[Tensor]) -> None:
        """Take an unquantized input [..., in_features]; of a row linear each rank's part."""
        x = torch.cat(parts, dim=-1).flatten(0, -2)
        self._amax = torch.maximum(self._amax.to(x.device), x.abs().amax(0))
        unsmoothed = x
        if self._smoothing:
            by_rank = self._linear in ROW_LINEARS
            x = x * torch.cat(self._smoothing if by_rank else self._smoothing[:1])
        if self._scale is not None:
            steps = x / self._scale
            if self._grid == "int8":
                beyond = (steps.round() > 127) | (steps.round() < -128)
            else:
                beyond = steps.abs() >= E4M3_BEYOND
            self._beyond += int(beyond.sum())
            self._values += x.numel()
            rounded = fake_quantize(x, self._scale, self._grid)
        elif self._dynamic:
            own = unsmoothed if self._own else x  # what has a factor of its own is smoothed there
            rounded = rounded_inputs(self._quantized[0], self._linear, own)
        else:
            return
        self._noise += _squares(rounded - x)
        self._power += _squares(x)

    def result(self, layer: int) -> LinearQuality:
        """Return the numbers of all inputs so far, and of the weight."""
        inputs = self._scale is not None or self._dynamic
        channels = self._amax.cpu().numpy()
        median = float(np.median(channels))
        return LinearQuality(
            layer,
            self._linear,
            self._weight_error(),
            _relative(self._noise, self._power) if inputs else None,
            self._beyond / self._values if self._values else None,
            float(channels.max()) / median if median > 0 else math.inf,
        )

    def _weight_error(self) -> float:
        noise = power = 0.0
        name = f"{self._linear}.weight"
        for rank, (plain, quantized) in enumerate(zip(self._plain, self._quantized, strict=True)):
            weight = weight_values(quantized, self._linear, plain[name].shape[-1], torch.float32)
            blocks = zip(plain[name].split(_ROWS), weight.split(_ROWS), strict=True)
            for before, after in blocks:
                expected = before / self._smoothing[rank] if self._smoothing else before
                noise += _squares(after - expected)
                power += _squares(expected)
        return _relative(noise, power)


def _relative(noise: float, power: float) -> float:
    """Return the root of noise over power; infinite for noise where there should be nothing."""
    if noise == 0:
        return 0.0
    if power == 0 or not math.isfinite(noise):
        return math.inf
    return math.sqrt(noise / power)


def _squares(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
