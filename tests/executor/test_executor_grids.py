"""The grids and the linears on them, against values computed by hand and plain loops."""

import itertools
import math

import pytest
import torch

from phireg.executor import quantized

# Written out from the format: 4 exponent bits with bias 7, 3 of the mantissa, no infinities.
E4M3 = sorted(
    {m * 2.0**-9 for m in range(8)}
    | {(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)}
)


def fake(values, scale, grid):
    x = torch.tensor(values, dtype=torch.float32)
    return quantized.fake_quantize(x, torch.tensor([scale]), grid).tolist()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_e4m3_value_is_its_own_nearest(scale):
    for sign in (1, -1):
        values = [sign * v * scale for v in E4M3]
        assert fake(values, scale, "fp8") == values


def test_between_two_e4m3_values_the_nearer_one_wins_and_ties_go_to_even():
    # Even is an even mantissa: every second value of the list, 0 first.
    for n, (low, high) in enumerate(itertools.pairwise(E4M3)):
        middle = (low + high) / 2
        little = middle * 2**-22
        actual = fake([middle, middle - little, middle + little, -middle], 1.0, "fp8")
        tie = low if n % 2 == 0 else high
        assert actual == [tie, low, high, -tie], (low, high)


def test_e4m3_by_hand():
    assert fake([17.0, 19.0, 18.9, 0.0, -0.3], 1.0, "fp8") == [16.0, 20.0, 18.0, 0.0, -0.3125]
    # subnormal: steps of 2^-9; half of the smallest is a tie and goes to 0
    assert fake([2**-10, 2**-10 * 1.01, 3 * 2**-10, 5 * 2**-10], 1.0, "fp8") == [
        0.0, 2**-9, 2 * 2**-9, 2 * 2**-9,
    ]  # fmt: skip
    assert fake([1e-30, -1e-44], 1.0, "fp8") == [0.0, 0.0]
    assert fake([448.0, 449.0, 464.0, 1e30, math.inf, -math.inf], 1.0, "fp8") == [
        448.0, 448.0, 448.0, 448.0, 448.0, -448.0,
    ]  # fmt: skip
    assert fake([1000.0, 2.1], 2.0, "fp8") == [896.0, 2.0]
    assert math.isnan(fake([math.nan], 1.0, "fp8")[0])


def test_int8_by_hand():
    actual = fake([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -128.4, -1e9], 1.0, "int8")
    assert actual == [0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 127.0, 127.0, -128.0, -128.0]
    assert fake([0.25, 0.75, 1.0, 100.0], 0.5, "int8") == [0.0, 1.0, 1.0, 63.5]


def test_weight_only_by_hand():
    # The scale is 1/128 of the row's maximum, so that the maximum itself is cut to 127.
    weight = torch.tensor([[128.0, 0.5, 1.5, -0.5, 2.49, -127.5], [-2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    assert quantized.weight_only(weight, 8).values(torch.float32).tolist() == [
        [127.0, 1.0, 2.0, -1.0, 2.0, -128.0], [-2.0, 1.0, 0.0, 0.0, 0.0, 0.0],
    ]  # fmt: skip
    weight = torch.tensor([[-8.0, 8.0, 0.5, -2.5, 6.4], [0.0, 0.0, 0.0, 0.0, 0.0]])
    actual = quantized.weight_only(weight, 4).values(torch.float32)
    assert actual.tolist() == [[-8.0, 7.0, 1.0, -3.0, 6.0], [0.0] * 5]


def test_weight_only_rounds_by_the_full_scale_and_multiplies_by_the_stored_one():
    weight = torch.tensor([[1.01, 0.4, -0.7]], dtype=torch.bfloat16)
    scale = weight[0, 0].item() / 8
    stored = torch.tensor(scale).bfloat16().item()
    whole = [7, *(math.floor(abs(w) / scale + 0.5) * (-1 if w < 0 else 1) for w in weight[0, 1:])]
    assert quantized.weight_only(weight, 4).values(torch.float32)[0].tolist() == [
        n * stored for n in whole
    ]
    # a bfloat16 number over 8 is one again, except below its normal numbers
    tiny = torch.tensor([[3 * 2.0**-133, -(2.0**-133)]], dtype=torch.bfloat16)
    assert quantized.weight_only(tiny, 4).values(torch.float32).abs().max() == 0


def linear_case(dtype, seed=0):
    """A linear of 48 outputs and 32 inputs, with inputs beyond the scale."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 5, 32, generator=generator) * 3).to(dtype)
    weight = torch.randn(48, 32, generator=generator)
    bias = torch.randn(48, generator=generator).to(dtype)
    return x, weight, bias


def check_linear(prepared, x, bias, expected, tolerance):
    actual = quantized.linear(prepared, "mlp.fc", x, bias)
    assert (actual.dtype, actual.shape) == (x.dtype, (2, 5, 48))
    assert (actual.double() - expected).norm() / expected.norm() < max(tolerance, 5e-7)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("native", [False, True])
def test_an_fp8_linear(dtype, native, monkeypatch):
    x, weight, bias = linear_case(dtype)
    x_scale, w_scale = torch.tensor([0.02]), torch.tensor([0.004])
    stored = (weight / w_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    inputs = (x.float() / x_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (x.float().abs() > 448 * x_scale).any()
    scales = x_scale.double() * w_scale.double()
    expected = inputs.double() @ stored.double().T * scales + bias.double()

    monkeypatch.setattr(quantized, "keeps_levels", lambda device, grid: native)
    tensors = {
        "mlp.fc.weight": stored,
        "mlp.fc.weights_scaling_factor": w_scale,
        "mlp.fc.activation_scaling_factor": x_scale,
    }
    scheme = quantized.Quantization("fp8")
    prepared = quantized.prepare(scheme, tensors, torch.device("cpu"), dtype)
    assert ("mlp.fc.e4m3" in prepared) == native
    check_linear(prepared, x, bias, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_smoothed_int8_linear(dtype):
    x, weight, bias = linear_case(dtype, seed=1)
    x_scale, w_scale = torch.tensor([0.03]), weight.abs().amax(1) / 127
    smoothing = torch.linspace(0.4, 2, 32).to(dtype)
    stored = (weight / w_scale[:, None]).round().to(torch.int8)
    smoothed = (x * smoothing).float()  # rounded to the dtype
    inputs = (smoothed / x_scale).round().clamp(-128, 127)
    assert (smoothed.abs() > 128 * x_scale).any()
    inputs, weight = (
        (value.float() * scale).to(dtype).double()
        for value, scale in ((inputs, x_scale), (stored, w_scale[:, None]))
    )
    tensors = {
        "mlp.fc.weight": stored,
        "mlp.fc.weights_scaling_factor": w_scale,
        "mlp.fc.activation_scaling_factor": x_scale,
        "mlp.fc.prequant_scaling_factor": smoothing,
    }
    scheme = quantized.Quantization("int8_sq")
    prepared = quantized.prepare(scheme, tensors, torch.device("cpu"), dtype)
    check_linear(prepared, x, bias, inputs @ weight.T + bias.double(), torch.finfo(dtype).eps / 2)
