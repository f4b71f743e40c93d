"""The conformance check of quantized checkpoints.

The source is quantized and dequantized here, module by module, and converted unquantized; the
quantized checkpoint, dequantized by the reader's formula, must hold the same values. Independent of
the conversion are the arithmetic (whole tensors in torch, no grids, blocks or ranks of it) and the
order of the steps: scales are computed before any row is moved, so a scale that is not moved with
its rows shows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import phireg
from phireg.calibration.statistics import Statistics
from phireg.dtypes import E4M3_MAX, INT8_MAX
from phireg.planning.model import QuantizedLinear
from phireg.reader.schemes import SCHEMES, Scheme
from phireg.testing.model import TinyModel

_SMALLEST_SMOOTHER, _LARGEST_SMOOTHER = 1e-4, 1e4
_TOLERANCE = 1e-5
"""Of a tensor's largest value. A step of a quantized weight is more than a hundred times that."""

Maxima = Mapping[str, npt.NDArray[np.float32]]
"""Largest |x| per input channel of a source linear, by module."""


def schemes_of(model: TinyModel) -> Iterator[Scheme]:
    """Yield the schemes for which the family names linears; a tiny model's make no groups."""
    translation, _ = model.translate()
    for scheme in SCHEMES.values():
        if (
            scheme.storage is None
            and model.family.quant_rules(translation.fields, scheme.quant_algo).linears
        ):
            yield scheme


def scale_problems(model: TinyModel, tp_size: int, scheme: Scheme) -> str | None:
    """Describe the first difference from the quantized source; None if there is none."""
    if problems := model.plan_problems(tp_size, scheme.qformat):
        return problems
    plan = model.plan(tp_size, scheme.qformat)
    linears = {linear.target: linear for linear in plan.linears}
    rng = np.random.default_rng(0)
    maxima: Maxima = {
        module: rng.uniform(0.5, 8.0, linear.columns).astype(np.float32)
        for linear in linears.values()
        for module in linear.sources
    }
    output = model.directory / f"{scheme.qformat}-tp{tp_size}"
    phireg.quantize(plan, output, Statistics(maxima, (), (), {}))
    dequantized = model.directory / f"source-{scheme.qformat}"
    if not dequantized.exists():
        _write_dequantized(model, dequantized, scheme, linears.values(), maxima)
    reference = model.convert(dequantized, tp_size)
    for rank in range(tp_size):
        file = f"rank{rank}.safetensors"
        tensors = load_file(output / file)
        for name, expected in load_file(reference / file).items():
            target = name.rpartition(".")[0]
            quantized = target in linears and name.endswith(".weight")
            actual = _dequantize(tensors, target, scheme) if quantized else tensors[name]
            if difference := _difference(actual, expected):
                return (
                    f"TP {tp_size}, {scheme.qformat}: rank {rank} {name} differs from the "
                    f"quantized source: {difference}  [{model.place(name)}]"
                )
    return None


def _difference(actual: Tensor, expected: Tensor) -> str | None:
    error = (actual.float() - expected.float()).abs().reshape(len(expected), -1).amax(1)
    wrong = ~(error <= _TOLERANCE * expected.abs().max())
    if not wrong.any():
        return None
    row = int(wrong.int().argmax())
    return f"row {row} is off by {float(error[row]):.3g} ({int(wrong.sum())} of {len(wrong)} rows)"


def _write_dequantized(
    model: TinyModel,
    directory: Path,
    scheme: Scheme,
    linears: Iterable[QuantizedLinear],
    maxima: Maxima,
) -> None:
    """Write the source with the dequantized values of every quantized linear's weight."""
    tensors: dict[str, Tensor] = {}
    for file in model.source.files:
        tensors |= load_file(model.source.directory / file.name)
    for linear in linears:
        inputs = np.maximum.reduce([maxima[module] for module in linear.sources])
        for modules in linear.groups:
            names = [f"{module}.weight" for module in modules]
            weights = [tensors[name] for name in names]
            rounded = _smoothquant(weights, inputs) if scheme.per_channel else _fp8(weights)
            tensors |= dict(zip(names, rounded, strict=True))
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    shutil.copyfile(model.source_dir / "config.json", directory / "config.json")


def _fp8(weights: list[Tensor]) -> list[Tensor]:
    """Round fused weights to FP8 with one scale."""
    scale = torch.stack([weight.abs().max() for weight in weights]).max() / E4M3_MAX
    return [(weight / scale).to(torch.float8_e4m3fn).float() * scale for weight in weights]


def _smoothquant(weights: list[Tensor], inputs: npt.NDArray[np.float32]) -> list[Tensor]:
    """Round fused weights to int8 with one smoothing vector and a scale for each row."""
    smoother = (1 / torch.from_numpy(inputs)).clamp(_SMALLEST_SMOOTHER, _LARGEST_SMOOTHER)
    rounded = []
    for weight in weights:
        smoothed = weight * (1 / smoother)
        scale = smoothed.abs().amax(1, keepdim=True) / INT8_MAX
        rounded.append((smoothed / scale).round().clamp(-128, 127) * scale * smoother)
    return rounded


def _dequantize(tensors: Mapping[str, Tensor], target: str, scheme: Scheme) -> Tensor:
    """Dequantize a rank's weight by the reader's formula."""
    weight = tensors[f"{target}.weight"].float()
    scale = tensors[f"{target}.weights_scaling_factor"]
    if not scheme.per_channel:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))  # an expert's, or the only one
    return weight * scale[:, None] * tensors[f"{target}.prequant_scaling_factor"].float()
