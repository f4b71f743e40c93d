"""How far the values of a quantized module are from the source's, on the stored grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from phireg.executor.levels import Levels
from phireg.executor.stored import Stored
from phireg.reader.modules import Module

ALIKE = 0.35
"""Relative error of a weight of four bits, and less of eight, that is the source's; of another
one it is 1.4."""


def steps(part: Stored, module: Module, expected: Tensor) -> Tensor:
    """Return the step of the grid at every value."""
    if module.storage is None:
        return torch.zeros(())
    if not isinstance(part.weight, Levels):  # int4 products that were rounded to e4m3
        groups = part.weight.abs().unflatten(-1, (-1, module.storage.form.group_size or 1))
        return (groups.amax(-1) / 5).repeat_interleave(groups.shape[-1], dim=-1)
    levels = part.weight
    scale = torch.ones(())
    if levels.group_scale is not None:
        size = expected.shape[-1] // levels.group_scale.shape[-1]
        scale = levels.group_scale.float().repeat_interleave(size, dim=-1)
    if levels.scale is not None:
        scale = scale * levels.scale[..., None]
    if levels.grid in ("int8", "int4"):
        return scale.expand_as(expected)
    levels_apart = (expected / scale).abs()
    if levels.grid == "e2m1":
        gaps = torch.where(levels_apart < 2, 0.5, torch.where(levels_apart < 4, 1.0, 2.0))
        return gaps * scale
    return torch.exp2(levels_apart.clamp_min(2.0**-6).log2().floor() - 3) * scale


def fit(values: Tensor, expected: Tensor, dim: int) -> Tensor:
    """Return the factor of each column (0) or row (1) that makes ``expected`` nearest."""
    power = expected.square().sum(dim)
    return torch.where(power > 0, (values * expected).sum(dim) / power.clamp_min(1e-30), 1.0)


def explaining_factors(values: Tensor, expected: Tensor) -> Tensor | None:
    """Return factors of all, of rows [n, 1] or columns [1, n] that explain a difference."""
    least, best = 0.9 * relative_error(values, expected), None
    for factors in (
        _whole_fit(values, expected).reshape(1),
        fit(values, expected, 1)[:, None],
        fit(values, expected, 0)[None],
    ):
        left = relative_error(values, factors * expected)
        if left < min(least, ALIKE / 2):
            least, best = 0.9 * left, factors
    return best


def is_scaled(module: Module, values: Tensor, expected: Tensor) -> bool:
    """Return whether scales of eight-bit weights are off by less than a step."""
    storage = module.storage
    if storage is None or storage.form.weight not in ("e4m3", "int8"):
        return False
    if storage.form.per == "tensor":
        return bool((_whole_fit(values, expected) - 1).abs() > 0.005)
    return bool(((fit(values, expected, 1) - 1).abs() > 0.02).any())


def _whole_fit(values: Tensor, expected: Tensor) -> Tensor:
    return (values * expected).sum() / expected.square().sum().clamp_min(1e-30)


def relative_error(values: Tensor, expected: Tensor) -> float:
    """Return the size of the difference over that of what is expected."""
    return float((values - expected).norm() / expected.norm().clamp_min(1e-30))


def is_alike(stored: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether values on four-bit grids or finer ones are the source's."""
    error = np.linalg.norm(stored - expected) / max(float(np.linalg.norm(expected)), 1e-30)
    return bool(error < ALIKE)


def has_exchanged_nibbles(module: Module, part: Stored, expected: Tensor) -> bool:
    """Return whether exchanging the four-bit values of each pair gives the source's."""
    storage, weight = module.storage, part.weight
    if storage is None or storage.packing is None or not isinstance(weight, Levels):
        return False
    levels = weight.levels.view(torch.uint8)
    if storage.packing == "rows":
        swapped = levels.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    elif levels.shape[1] % 8 == 0:
        size = 2 if storage.packing == "columns" else 8 if storage.form.weight == "int4" else 4
        orders = [levels.unflatten(1, (-1, size)).flip(2).flatten(1)]
        orders.append(levels.unflatten(1, (-1, 2)).flip(2).flatten(1))
        return any(_swapped_alike(weight, order, expected) for order in orders)
    else:
        return False
    return _swapped_alike(weight, swapped, expected)


def _swapped_alike(weight: Levels, levels: Tensor, expected: Tensor) -> bool:
    other = Levels(weight.grid, levels.view(weight.levels.dtype), weight.scale, weight.group_scale)
    return relative_error(other.values(torch.float32), expected) < ALIKE
