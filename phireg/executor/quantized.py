"""The arithmetic of quantized linears and of the quantized key/value cache.

Quantized values lie on a grid: e4m3 up to 448, or the integers -128 to 127, times a scaling factor.
``fake_quantize`` gives the values on the grid in the compute dtype, as a graph of TensorRT's
quantize and dequantize nodes does: products of them are the quantized product, up to the compute
dtype's rounding.

``prepare`` decides once, when a layer is read, how each linear is computed; ``linear`` follows the
dtype and the scales it finds. All of it is device arithmetic with static shapes, so that a decode
step can be captured.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from phireg import formats
from phireg.dtypes import E4M3_MAX, E4M3_SMALLEST_NORMAL
from phireg.executor.levels import E2M1, TILED, Levels, Packed, find_packed, is_per_expert
from phireg.formats import FORMATS, LARGEST, Inputs
from phireg.reader.schemes import LINEARS, Grid, Quantization
from phireg.reader.tensors import ROUTER

_WEIGHT_ONLY_BITS: Mapping[str, Literal[4, 8]] = {"int8_wo": 8, "int4_wo": 4}


def prepare(
    quantization: Quantization,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return one rank's tensors of a layer as ``linear`` needs them, on the device.

    They keep their names, which are those in the file without the layer's prefix. Scales of
    activations and of the cache and the router of experts are float32, everything else has the
    compute dtype: a quantized weight becomes the values of its levels. On a GPU it stays as
    ``Levels.packed`` has it.
    """
    prepared = {}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        if part == "weights_scaling_factor":
            continue
        if part in ("activation_scaling_factor", "kv_cache_scaling_factor") or name == ROUTER:
            prepared[name] = tensor.to(device)
        elif part != "weight" or linear not in LINEARS or quantization.weights is None:
            prepared[name] = tensor.to(device, dtype)
        else:
            scale = tensors.get(f"{linear}.weights_scaling_factor")
            weight = stored_levels(quantization.weights, tensor, scale, device)
            if keeps_weight(device, weight):
                prepared |= weight.packed(linear)
            else:
                prepared[name] = weight.values(dtype)
    return prepared


def keeps_levels(device: torch.device, grid: str) -> bool:
    """Return whether quantized weights, and keys and values, stay levels: it takes kernels.

    A CPU has no use for that, and GPUs before compute capability 8.9 do not know e4m3, of which
    the scales of e2m1 are, too.
    """
    return device.type == "cuda" and (grid in ("int8", "int4") or _knows_e4m3(device))


@functools.cache
def _knows_e4m3(device: torch.device) -> bool:
    return device.type != "cuda" or bool(torch.cuda.get_device_capability(device) >= (8, 9))


def keeps_weight(device: torch.device, weight: Levels) -> bool:
    """Return whether ``keeps_levels`` holds of a weight, and kernels know its sizes."""
    groups, rows = weight.group_scale, weight.levels.shape[-2]
    if weight.grid in TILED and rows % 32:  # a tile's, twice if a nonlinearity joins two
        return False
    if groups is None:
        return weight.grid != "e2m1" and keeps_levels(device, weight.grid)
    size = weight.levels.shape[-1] // groups.shape[-1]
    known = {"e2m1": size == 16, "int4": size == 32 or size % 64 == 0}
    return known.get(weight.grid, False) and keeps_levels(device, weight.grid)


def stored_levels(form: str, weight: Tensor, scale: Tensor | None, device: torch.device) -> Levels:
    """Return a quantized weight of a checkpoint, on the device."""
    weight = weight.to(device)
    if form in _WEIGHT_ONLY_BITS:
        return weight_only(weight, _WEIGHT_ONLY_BITS[form])
    assert scale is not None
    return Levels(formats.FORMATS[form].weight, weight, scale.to(device))


def is_divided(weights: Mapping[str, Tensor], name: str, part: int = 0) -> bool:
    """Return whether a linear has its parts, or this one of them, under their numbers."""
    prefix = f"{name}.{part}."
    return any(key.startswith(prefix) for key in weights)


def of_expert(weights: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the linears of one of a rank's experts, out of ``prepare``'s stacks."""
    return {
        name: tensor[index] if is_per_expert(name) else tensor
        for name, tensor in weights.items()
        if name.startswith(("mlp.fc.", "mlp.proj."))
    }


def weight_only(weight: Tensor, bits: Literal[4, 8]) -> Levels:
    """Return the integers TensorRT-LLM's builder stores of a raw weight [out, in].

    One scale per row, max|row| / 2^(bits - 1), rounds in float32, half away from zero; the scale
    that multiplies again is rounded to the weight's dtype. The builder sees one rank: a row of a
    row linear has another scale on every rank.
    """
    end = 2 ** (bits - 1)
    values = weight.float()
    scale = values.abs().amax(dim=1, keepdim=True) / end
    scaled = values / scale.where(scale > 0, 1)
    whole = scaled.trunc()
    away = (scaled - whole).abs() >= 0.5
    stored = (whole + scaled.sign() * away).clamp(-end, end - 1)
    grid: formats.Grid = "int8" if bits == 8 else "int4"
    return Levels(grid, stored.to(torch.int8), scale[:, 0].to(weight.dtype).float())


def fake_quantize(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the nearest values on a grid, ties to even, its ends included."""
    scaled = x.float() / scale
    stored = scaled.round().clamp(-128, 127) if grid == "int8" else round_to_e4m3(scaled)
    return (stored * scale).to(x.dtype)


def round_to_e4m3(x: Tensor) -> Tensor:
    """Round float32 values to e4m3's, ties to even, without the cast that some devices lack."""
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^exponent
    # Three bits after the leading one are kept, fewer below the smallest normal number. The ulp of
    # `shift` is the grid's step here, so that adding it rounds and subtracting it restores.
    shift = power.clamp(min=E4M3_SMALLEST_NORMAL) * (1.5 * 2.0**20)
    return (x + shift) - shift


def _round_e2m1(x: Tensor) -> Tensor:
    """Round float32 values to e2m1's, ties to even; those beyond 6 become it."""
    table, middles = _e2m1_table(x.device)
    return table[torch.bucketize(x.abs(), middles)] * x.sign()


@functools.cache
def _e2m1_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return magnitudes, and what lies between; on a GPU before a step that uses it is captured."""
    table = torch.tensor(E2M1, device=device)
    middles = (table[1:] + table[:-1]) / 2
    # At an even place a tie goes down, at an odd one up.
    middles[1::2] = middles[1::2].nextafter(table[0])
    return table, middles


def inputs_name(inputs: Inputs, *, smoothed: bool) -> str:
    """Return what the scale of a linear's inputs is called, after the linear's name.

    The name says what is done; of scales that are computed as it runs the tensor is empty. A GPU
    multiplies what has FP8's usual name as it is stored.
    """
    if inputs == FORMATS["fp8"].inputs and not smoothed:
        return "activation_scaling_factor"
    return f"inputs_{inputs.grid}_{inputs.scale}"


def rounded_inputs(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Return a linear's inputs as ``inputs_name`` says, smoothed first in the compute dtype."""
    smoothing = weights.get(f"{name}.smoothing")
    x = x if smoothing is None else x * smoothing
    for grid in ("e4m3", "int8"):
        scale = weights.get(f"{name}.inputs_{grid}_tensor")
        if scale is None and f"{name}.inputs_{grid}_token" in weights:
            scale = x.float().abs().amax(dim=-1, keepdim=True) / LARGEST[grid]
            scale = scale.where(scale > 0, 1)
        if scale is not None:
            x = fake_quantize(x, scale, "int8" if grid == "int8" else "fp8")
    scale = weights.get(f"{name}.inputs_e2m1_group")
    return x if scale is None else _two_level(x, scale)


def _two_level(x: Tensor, second: Tensor) -> Tensor:
    """Return values on e2m1 times an e4m3 scale of each 16 and one float32 scale of all."""
    groups = x.float().unflatten(-1, (-1, FORMATS["nvfp4"].group_size or 1))
    scale = groups.abs().amax(dim=-1, keepdim=True) / (LARGEST["e2m1"] * second)
    scale = round_to_e4m3(scale) * second
    levels = _round_e2m1(groups / scale.where(scale > 0, 1))
    return (levels * scale).flatten(-2).to(x.dtype)


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return X W^T + b of a quantized or unquantized linear.

    FP8: x / as is rounded to e4m3, the product is multiplied by as * ws. INT8 SmoothQuant: x is
    multiplied by the smoothing vector in the compute dtype, then x / as is rounded to an integer.
    ``weights`` are from ``prepare``, or unquantized; ``x`` is [..., in_features] in the compute
    dtype. A linear whose parts round their inputs in different ways has these under their numbers.
    """
    if is_divided(weights, name):
        parts: list[Tensor] = []
        while is_divided(weights, name, len(parts)):
            parts.append(linear(weights, f"{name}.{len(parts)}", x, None))
        y = torch.cat(parts, dim=-1)
        return y if bias is None else y + bias
    x = rounded_inputs(weights, name, x)
    scale = weights.get(f"{name}.activation_scaling_factor")
    packed = find_packed(weights, name)
    if packed is not None and scale is not None and multiplies_e4m3(packed, x.dtype):
        stored = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return stored_product(stored, packed, scale, x.dtype, bias)
    if scale is not None:
        smoothing = weights.get(f"{name}.prequant_scaling_factor")
        grid: Grid = "fp8" if smoothing is None else "int8"
        x = fake_quantize(x if smoothing is None else x * smoothing, scale, grid)
    return functional.linear(x, weight_values(weights, name, x.shape[-1], x.dtype), bias)


def weight_values(
    weights: Mapping[str, Tensor], name: str, inputs: int, dtype: torch.dtype
) -> Tensor:
    """Return a linear's weight [out, in] in the compute dtype, however it is kept."""
    packed = find_packed(weights, name)
    return weights[f"{name}.weight"] if packed is None else packed.levels(inputs).values(dtype)


def multiplies_e4m3(weight: Packed, dtype: torch.dtype) -> bool:
    """Return whether a device (a GPU of compute capability 8.9 or more) has products of e4m3.

    They want both sizes in multiples of 16, one scale, and half-precision results.
    """
    scale, device = weight.scale, weight.data.device
    return (
        weight.grid == "e4m3"
        and scale is not None
        and scale.numel() == 1
        and dtype != torch.float32
        and not any(size % 16 for size in weight.data.shape)
        and _knows_e4m3(device)
    )


def stored_product(
    x: Tensor, weight: Packed, x_scale: Tensor, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """Return X W^T + b of e4m3 values, times both float32 [1] scales; see ``multiplies_e4m3``."""
    scale = weight.scale
    if scale is not None and scale.data_ptr() % 16:
        scale = scale.clone()  # one expert's, out of a stack
    y = torch._scaled_mm(
        x.flatten(0, -2), weight.data.t(), scale_a=x_scale, scale_b=scale, bias=bias,
        out_dtype=dtype,
    )  # fmt: skip
    return y.unflatten(0, x.shape[:-1])
