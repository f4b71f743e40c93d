"""Quantized checkpoints of a tiny model against its source, quantized in plain arithmetic."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import phireg
from phireg.calibration.statistics import Statistics
from phireg.dtypes import E4M3_MAX, INT8_MAX
from phireg.planning.model import QuantizedLinear
from phireg.reader.schemes import SCHEMES, Scheme
from phireg.testing.model import TinyModel

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_SMOOTHER, _LARGEST_SMOOTHER = 1e-4, 1e4
_TOLERANCE = 1e-5
"""Of a tensor's largest value. A step of a quantized weight is more than a hundred times that."""

Maxima = Mapping[str, npt.NDArray[np.float32]]
"""Largest |x| per input channel of a source linear, by module."""


def schemes_of(model: TinyModel) -> Iterator[Scheme]:
    """The schemes for which the family names linears."""
    translation, _ = model.translated()
    for scheme in SCHEMES.values():
        if model.family.quant_rules(translation.fields, scheme.quant_algo).linears:
            yield scheme


def scale_problems(model: TinyModel, tp_size: int, scheme: Scheme) -> str | None:
    """Where the quantized checkpoint and the quantized source differ; None if they do not.

    Args:
        model: the model; it has an unquantized plan at this size.
        tp_size: number of ranks.
        scheme: how to quantize.
    """
    place = model.places.hook("phireg_quant_rules")
    if problems := model.plan_problems(tp_size, scheme.qformat):
        return f"{problems}\n    {place}  the quantization rules"
    plan = model.planned(tp_size, qformat=scheme.qformat)
    linears = {linear.target: linear for linear in plan.linears}
    maxima = _maxima(linears.values())
    output = model.directory / f"{scheme.qformat}-tp{tp_size}"
    phireg.quantize(plan, output, Statistics(maxima, (), (), {}))
    dequantized = model.directory / f"source-{scheme.qformat}"
    if not dequantized.exists():
        _write_dequantized(model, dequantized, scheme, linears.values(), maxima)
    expected = model.convert(dequantized, tp_size)
    for rank in range(tp_size):
        file = f"rank{rank}.safetensors"
        found, wanted = _load(output / file), _load(expected / file)
        for name, values in wanted.items():
            target = name.rpartition(".")[0]
            quantized = target in linears and name.endswith(".weight")
            got = _dequantized(found, target, scheme) if quantized else found[name]
            if problem := _difference(got, values):
                return (
                    f"TP {tp_size}, {scheme.qformat}: rank {rank} {name} is not what the quantized "
                    f"source gives: {problem}\n"
                    f"    {model.places.where(name)}; quantized as {place} says"
                )
    return None


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _difference(got: Tensor, wanted: Tensor) -> str | None:
    error = (got.float() - wanted.float()).abs().reshape(len(wanted), -1).amax(1)
    wrong = ~(error <= _TOLERANCE * wanted.abs().max())
    if not wrong.any():
        return None
    row = int(wrong.int().argmax())
    return f"row {row} is off by {float(error[row]):.3g} ({int(wrong.sum())} of {len(wrong)} rows)"


def _maxima(linears: Iterable[QuantizedLinear]) -> Maxima:
    """Made-up input maxima, no two alike."""
    rng = np.random.default_rng(0)
    return {
        module: rng.uniform(0.5, 8.0, linear.columns).astype(np.float32)
        for linear in linears
        for module in linear.sources
    }


def _write_dequantized(
    model: TinyModel,
    directory: Path,
    scheme: Scheme,
    linears: Iterable[QuantizedLinear],
    maxima: Maxima,
) -> None:
    """The source with every linear's weight as its quantized values stand for."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for file in model.source.files:
        tensors |= _load(model.source.directory / file.name)
    for linear in linears:
        names = [f"{module}.weight" for module in linear.sources]
        inputs = np.maximum.reduce([maxima[module] for module in linear.sources])
        weights = [tensors[name] for name in names]
        made = _smoothquant(weights, inputs) if scheme.per_channel else _fp8(weights)
        tensors |= dict(zip(names, made, strict=True))
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    shutil.copyfile(model.source_dir / "config.json", directory / "config.json")


def _fp8(weights: list[Tensor]) -> list[Tensor]:
    """One scale for all that are fused."""
    import torch

    scale = torch.stack([weight.abs().max() for weight in weights]).max() / E4M3_MAX
    return [(weight / scale).to(torch.float8_e4m3fn).float() * scale for weight in weights]


def _smoothquant(weights: list[Tensor], inputs: npt.NDArray[np.float32]) -> list[Tensor]:
    """One smoothing vector for all that are fused, and a scale for each row."""
    import torch

    smoother = (1 / torch.from_numpy(inputs)).clamp(_SMALLEST_SMOOTHER, _LARGEST_SMOOTHER)
    made = []
    for weight in weights:
        smoothed = weight * (1 / smoother)
        scale = smoothed.abs().amax(1, keepdim=True) / INT8_MAX
        made.append((smoothed / scale).round().clamp(-128, 127) * scale * smoother)
    return made


def _dequantized(tensors: Mapping[str, Tensor], target: str, scheme: Scheme) -> Tensor:
    """The values that a rank's quantized weight stands for, by the reader's formula."""
    weight = tensors[f"{target}.weight"].float()
    scale = tensors[f"{target}.weights_scaling_factor"]
    if not scheme.per_channel:
        return weight * scale
    return weight * scale[:, None] * tensors[f"{target}.prequant_scaling_factor"].float()
