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

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from phireg.dtypes import E4M3_MAX, E4M3_SMALLEST_NORMAL
from phireg.reader.schemes import LINEARS, Grid, Quantization
from phireg.reader.tensors import ROUTER

_WEIGHT_ONLY_BITS = {"int8_wo": 8, "int4_wo": 4}


def prepare(
    quantization: Quantization,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return one rank's tensors of a layer as ``linear`` needs them, on the device.

    They keep their names, which are those in the file without the layer's prefix. Scales of
    activations and of the cache and the router of experts are float32, everything else has the
    compute dtype: weights on a grid are kept multiplied by their scales, which are then gone. Only
    where ``has_native_fp8`` do e4m3 weights stay e4m3 and keep their scale.
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
        elif quantization.weights in _WEIGHT_ONLY_BITS:
            bits = _WEIGHT_ONLY_BITS[quantization.weights]
            prepared[name] = weight_only(tensor.to(device), bits).to(dtype)
        else:
            scale_name = f"{linear}.weights_scaling_factor"
            scale, weight = tensors[scale_name].to(device), tensor.to(device)
            if has_native_fp8(weight.dtype, weight.shape, device, dtype):
                prepared |= {name: weight, scale_name: scale}
            else:
                prepared[name] = (weight.float() * scale[:, None]).to(dtype)
    return prepared


def has_native_fp8(
    weight: torch.dtype, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> bool:
    """Return whether a GPU (of compute capability 8.9 or more) multiplies e4m3 weights as they are.

    Its kernels want both sizes in multiples of 16, and are used for half-precision results.
    """
    return (
        weight == torch.float8_e4m3fn
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 9)
        and dtype != torch.float32
        and not any(size % 16 for size in shape[-2:])
    )


def of_expert(weights: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the linears of one of a rank's experts, out of ``prepare``'s stacks."""
    stacked = ("weight", "weights_scaling_factor")
    return {
        name: tensor[index] if name.endswith(stacked) else tensor
        for name, tensor in weights.items()
        if name.startswith(("mlp.fc.", "mlp.proj."))
    }


def weight_only(weight: Tensor, bits: int) -> Tensor:
    """Return a raw weight [out, in] through the integers TensorRT-LLM's builder stores, in float32.

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
    return stored * scale.to(weight.dtype).float()


def fake_quantize(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the nearest values on a grid, ties to even: ``x`` / scale, rounded, times scale.

    ``x`` has any shape and ``scale`` is float32 [1]; values beyond the grid's end become the end.
    """
    scaled = x.float() / scale
    if grid == "int8":
        stored = scaled.round().clamp(-128, 127)
    else:
        stored = _round_e4m3(scaled.clamp(-E4M3_MAX, E4M3_MAX))
    return (stored * scale).to(x.dtype)


def _round_e4m3(x: Tensor) -> Tensor:
    """Round float32 values of -448 to 448 to e4m3's, ties to even.

    Not by a cast, which not every device has; the kernels do the same.
    """
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^exponent
    # Three bits after the leading one are kept, fewer below the smallest normal number. The ulp of
    # `shift` is the grid's step here, so that adding it rounds and subtracting it restores.
    shift = power.clamp(min=E4M3_SMALLEST_NORMAL) * (1.5 * 2.0**20)
    return (x + shift) - shift


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return X W^T + b of a quantized or unquantized linear.

    FP8: x / as is rounded to e4m3, the product is multiplied by as * ws. INT8 SmoothQuant: x is
    multiplied by the smoothing vector in the compute dtype, then x / as is rounded to an integer.
    ``weights`` are from ``prepare``, or unquantized; ``x`` is [..., in_features] in the compute
    dtype.
    """
    weight = weights[f"{name}.weight"]
    scale = weights.get(f"{name}.activation_scaling_factor")
    if scale is None:
        return functional.linear(x, weight, bias)
    if weight.dtype == torch.float8_e4m3fn:
        stored = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        scales = (scale, weights[f"{name}.weights_scaling_factor"])
        y = stored_product(stored, weight, scales, x.dtype)
        return y if bias is None else y + bias
    smoothing = weights.get(f"{name}.prequant_scaling_factor")
    if smoothing is None:
        x = fake_quantize(x, scale, "fp8")
    else:
        x = fake_quantize(x * smoothing, scale, "int8")
    return functional.linear(x, weight, bias)


def stored_product(
    x: Tensor, weight: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """Return X W^T of e4m3 values, times two float32 [1] scales, on a GPU that has FP8."""
    y = torch._scaled_mm(
        x.flatten(0, -2), weight.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype
    )
    return y.unflatten(0, x.shape[:-1])
