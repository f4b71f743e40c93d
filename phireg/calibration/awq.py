"""AWQ's search: the factor of each input channel with which int4 weights change outputs least.

A weight is multiplied by the factors before it is quantized, and its inputs are divided by them.
The candidates are ModelOpt's: ``inputs ** a / weights ** (1 - a)`` with the mean magnitudes of
inputs and weights, for 11 exponents a.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from phireg.formats import FORMATS, LARGEST
from phireg.reference.observing import inputs_seen

EXPONENTS = [exponent.item() for exponent in torch.arange(0, 1.1, 0.1)]
PASSES = 2 + len(EXPONENTS)
"""What a search costs beside the maxima, in runs of a layer."""

GROUP = FORMATS["int4_awq"].group_size or 0
SMALLEST, LARGEST_FACTOR = 1e-4, 1e4
_TINY = torch.finfo(torch.float32).tiny
_NOTHING = 2.0**-24  # maxima of groups up to here count as zero
_PIECE = 1024  # rows that are quantized at once
_TOKENS = 4096  # at least, that a weight is quantized for


def weight_shares(weight: Tensor) -> Tensor:
    """Per column the mean of |W| / the maximum of its group, computed in the weight's dtype."""
    magnitudes = weight.abs().unflatten(1, (-1, GROUP))
    largest = magnitudes.amax(2, keepdim=True) + torch.finfo(weight.dtype).tiny
    return (magnitudes / largest).flatten(1).mean(0).float()


def factors(inputs: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """The candidate for an exponent, scaled so that its largest and smallest are reciprocals."""
    found = (inputs**exponent / (weights ** (1 - exponent) + _TINY)).clamp(SMALLEST, LARGEST_FACTOR)
    return found / (found.max() * found.min()).sqrt()


def rounded_weight(weight: Tensor, factor: Tensor) -> Tensor:
    """What int4 makes of ``weight * factor``, in the weight's dtype."""
    result = torch.empty_like(weight)
    top = torch.tensor(LARGEST["int4"], device=weight.device)  # a number / x is number * (1 / x)
    for start in range(0, len(weight), _PIECE):
        rows = (weight[start : start + _PIECE] * factor).unflatten(1, (-1, GROUP)).float()
        largest = rows.abs().amax(2, keepdim=True)
        nothing = largest <= _NOTHING
        steps = (top / largest).masked_fill(nothing, 0)
        levels = (rows * steps).round().clamp(-top - 1, top)
        values = levels / steps.masked_fill(nothing, 1)
        result[start : start + _PIECE] = values.flatten(1)
    return result


class Search:
    """The search for the linears of one layer; ``means`` are the mean magnitudes of their inputs.

    Linears whose inputs are no whole groups are left out: no format with AWQ takes them. It holds
    the inputs of some thousand tokens, or of one batch, and a copy of the largest weight.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], means: Mapping[str, Tensor]) -> None:
        linears = {name: x for name, x in linears.items() if x.in_features % GROUP == 0}
        self._linears = linears
        self._means = {name: means[name] for name in linears}
        self._shares = {name: weight_shares(linear.weight) for name, linear in linears.items()}
        self._losses = {
            name: torch.zeros(len(EXPONENTS), device=self._means[name].device) for name in linears
        }
        self._rows: dict[str, list[Tensor]] = {name: [] for name in linears}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the inputs of the linears."""

        def see(name: str, inputs: Tensor) -> None:
            # Row by row, as if each ran alone: nothing depends on the batches.
            self._rows[name] += inputs.detach().split(1)

        with inputs_seen(self._linears, see):
            yield

    def compare(self, tokens: int = _TOKENS) -> None:
        """Compare outputs for the inputs taken so far, if they have so many tokens."""
        for name, linear in self._linears.items():
            rows = self._rows[name]
            if sum(row.shape[1] for row in rows) < tokens:
                return
            self._losses[name] += self._loss(name, linear, rows)
            rows.clear()

    def best(self) -> dict[str, NDArray[np.float32]]:
        """The factors that inputs are multiplied by; the first of equal exponents is taken."""
        self.compare(0)
        found = {}
        for name, losses in self._losses.items():
            number = int(losses.nan_to_num(torch.inf).argmin())
            best = factors(self._means[name], self._shares[name], EXPONENTS[number])
            found[name] = (1 / best).cpu().numpy()
        return found

    def _loss(self, name: str, linear: nn.Linear, rows: Sequence[Tensor]) -> Tensor:
        """Per exponent the mean squared error of every row's output, summed over the rows."""
        dtype, bias = linear.weight.dtype, linear.bias
        wanted = [functional.linear(row, linear.weight, bias) for row in rows]
        losses = torch.zeros_like(self._losses[name])
        for number, exponent in enumerate(EXPONENTS):
            factor = factors(self._means[name], self._shares[name], exponent)
            weight = rounded_weight(linear.weight, factor.to(dtype))
            smoother = (1 / factor).to(dtype)
            for row, output in zip(rows, wanted, strict=True):
                error = functional.linear(row * smoother, weight, bias) - output
                losses[number] += error.float().square().mean()
        return losses
