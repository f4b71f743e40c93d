"""The kernels of linears on a GPU: products of one token and of a few, by every kind of weight."""

import pytest
import torch
import triton
from checkpoints_by_hand import relative_error
from kernel_cases import ACTIVATIONS, DEVICE, randn, spec
from torch.nn import functional

from phireg.executor import blocks, quantized
from phireg.executor.cuda import fused, launch, linears, tiles
from phireg.executor.levels import Levels


@pytest.mark.parametrize(("kind", "limit"), [("none", None), *ACTIVATIONS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [24, 1100])  # one block of columns, and two
def test_matvec(kind, limit, bias, inputs):
    x, weight = randn(1, 1, inputs), randn(26, inputs, seed=1) / inputs**0.5
    added = randn(26, seed=2) if bias else None
    expected = functional.linear(x, weight, added)
    if kind != "none":
        expected = blocks.activate(spec(activation=kind, gegelu_limit=limit), expected)
    weights = {"mlp.fc.weight": weight}
    act = {"activation": kind, "limit": limit}
    actual = linears.matvec(weights, "mlp.fc", x, added, x.dtype, **act)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 1e-6
    smoothing = 2.0 ** torch.arange(expected.shape[-1], device=DEVICE).remainder(3)
    rounding = launch.Rounding(torch.tensor([0.02], device=DEVICE), smoothing, "int8")
    levels = linears.matvec(weights, "mlp.fc", x, added, x.dtype, **act, rounding=rounding)
    assert torch.equal(levels, launch.quantize(actual, rounding, levels=True))


E2M1 = torch.tensor([s * m for s in (1, -1) for m in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])


def packed_weight(grid, rows, inputs, group, stack=()):
    """A weight of every level, its scales, and the float64 it stands for, by the definition."""
    generator = torch.Generator().manual_seed(inputs)
    table = {
        "int8": torch.arange(-128, 128), "int4": torch.arange(-8, 8), "e2m1": E2M1,
        "e4m3": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
    }[grid]  # fmt: skip
    table = table[~table.float().isnan()]
    levels = table[torch.randint(len(table), (*stack, rows, inputs), generator=generator)]
    value, scale, groups = levels.double(), None, None
    if group:
        groups = torch.rand(*stack, rows, inputs // group, generator=generator)
        groups = groups.to(torch.float8_e4m3fn if grid == "e2m1" else torch.float32)
        value = value * groups.double().repeat_interleave(group, -1)
    if not group or grid == "e2m1":
        one = group or grid == "e4m3"
        scale = torch.rand(*stack, 1 if one else rows, generator=generator) / 8 + 0.01
        value = value * scale.double()[..., None]
    levels = levels.to(torch.int8 if grid.startswith("int") else torch.float8_e4m3fn)
    weights = Levels(grid, levels, scale, groups).packed("mlp.fc")
    return {name: tensor.to(DEVICE) for name, tensor in weights.items()}, value.to(DEVICE)


PACKED = [
    ("e4m3", 48, 0), ("int8", 40, 0), ("int8", 336, 0), ("int4", 40, 0), ("int4", 384, 128),
    ("int4", 192, 32), ("int4", 576, 192), ("e2m1", 272, 16), ("e2m1", 1152, 16),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "inputs", "group"), PACKED)
def test_packed_weights(grid, inputs, group):
    """One token's product, a few tokens', and the expanded weight."""
    rows = {"int4": 96, "e2m1": 32}.get(grid, 18)
    weights, value = packed_weight(grid, rows, inputs, group)
    bias, x_scale = randn(rows, seed=2), torch.tensor([0.5], device=DEVICE)
    expanded = linears.expanded(weights, "mlp.fc", inputs, torch.float32)
    assert relative_error(expanded, value) < 1e-6

    def with_dtype(multiply):
        return lambda weights, name, x, bias, **s: multiply(weights, name, x, bias, x.dtype, **s)

    few = randn(2, 9, inputs)
    for product, x in ((linears.matvec, randn(1, inputs)), (linears.product, few)):
        multiply = with_dtype(product)
        expected = x.double() @ value.T * 0.5 + bias
        actual = multiply(weights, "mlp.fc", x, bias, x_scale=x_scale)
        assert relative_error(actual, expected) < 2e-6
        half = x.half()
        actual = multiply(weights, "mlp.fc", half, None)
        assert relative_error(actual, half.double() @ value.T) < 1e-3
        x[..., 0, 3] = torch.nan
        expected = (x.double() @ value.T).isnan()
        assert torch.equal(multiply(weights, "mlp.fc", x, None).isnan(), expected)


def test_a_product_reads_no_scale_beyond_the_last():
    """In float32, since Triton's interpreter takes e4m3's NaN for a number."""
    weights, value = packed_weight("e2m1", 32, 128, 16)
    name, x = "mlp.fc.group_scaling_factor", randn(2, 128)
    groups = weights[name].float()
    longer = torch.cat((groups.flatten(), torch.full_like(groups, torch.nan).flatten()))
    weights[name] = longer[: groups.numel()].view_as(groups)
    actual = linears.product(weights, "mlp.fc", x, None, x.dtype)
    assert relative_error(actual, x.double() @ value.T) < 2e-6


@pytest.mark.skipif(DEVICE == "cuda", reason="a kernel is compiled with the order of its Triton")
@pytest.mark.parametrize("run", [2, 4])
@pytest.mark.parametrize(("grid", "group"), [("int4", 0), ("int4", 32), ("e2m1", 16)])
def test_tiles_in_the_order_of_either_triton(run, grid, group, monkeypatch):
    monkeypatch.setattr(tiles, "_RUN", triton.language.constexpr(run))
    weights, value = packed_weight(grid, 32, 160, group)
    x = randn(1, 160)
    actual = linears.matvec(weights, "mlp.fc", x, None, x.dtype)
    assert relative_error(actual, x.double() @ value.T) < 2e-6


@pytest.mark.parametrize(("kind", "limit"), ACTIVATIONS)
@pytest.mark.parametrize(
    ("grid", "rows", "group"), [("int4", 160, 64), ("e2m1", 64, 16), ("e4m3", 38, 0)]
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_follows_a_product(kind, limit, grid, rows, group, tokens):
    weights, value = packed_weight(grid, rows, 192, group)
    x, bias = randn(tokens, 192) / 50, randn(rows, seed=2)
    expected = x.double() @ value.T + bias
    expected = blocks.activate(spec(activation=kind, gegelu_limit=limit), expected)
    act, multiply = {"activation": kind, "limit": limit}, product_of(tokens)
    actual = multiply(weights, "mlp.fc", x, bias, x.dtype, **act)
    assert relative_error(actual, expected) < 2e-6
    smoothing = 2.0 ** torch.arange(expected.shape[-1], device=DEVICE).remainder(3)
    rounding = launch.Rounding(torch.tensor([0.02], device=DEVICE), smoothing, "int8")
    levels = multiply(weights, "mlp.fc", x, bias, x.dtype, **act, rounding=rounding)
    assert torch.equal(levels, launch.quantize(actual, rounding, levels=True))


def product_of(tokens):
    return linears.matvec if tokens == 1 else linears.product


@pytest.mark.parametrize("tokens", [1, 3, 130])  # of one tile, and of two
@pytest.mark.parametrize("inputs", [42, 592])
def test_integers_are_multiplied_as_they_are(tokens, inputs):
    """The sums of products are exact; only scale and bias round them."""
    weights, _ = packed_weight("int8", 18, inputs, 0)
    weights["mlp.fc.weights_scaling_factor"] = torch.full((18,), 0.25, device=DEVICE)
    levels = randn(tokens, inputs).mul(70).clamp(-128, 127).to(torch.int8)
    bias, x_scale = torch.arange(18.0, device=DEVICE), torch.tensor([0.5], device=DEVICE)
    actual = product_of(tokens)(weights, "mlp.fc", levels, bias, torch.float32, x_scale=x_scale)
    expected = levels.long().cpu() @ weights["mlp.fc.int8"].long().cpu().T
    assert torch.equal(actual.cpu(), expected.float() / 8 + bias.cpu())


@pytest.mark.parametrize("inputs", [42, 592])
def test_products_of_e4m3(inputs):
    weights, value = packed_weight("e4m3", 18, inputs, 0)
    x, x_scale = randn(3, inputs).to(torch.float8_e4m3fn), torch.tensor([0.5], device=DEVICE)
    if DEVICE == "cuda":  # Triton's interpreter takes e4m3's NaN for a number
        x[1, 5] = torch.nan
    actual = linears.product(weights, "mlp.fc", x, None, torch.float32, x_scale=x_scale)
    expected = x.double() @ value.T * 0.5
    # Hopper's matrix units keep some fourteen bits of a sum of 128.
    exact = 1e-3 if DEVICE == "cuda" else 2e-6
    assert relative_error(actual[[0, 2]], expected[[0, 2]]) < exact
    assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("kind", ["none", "swiglu", "gegelu"])
@pytest.mark.parametrize(("tokens", "inputs"), [(1, 80), (3, 592), (66, 80)])
def test_what_follows_a_product_of_integers(kind, tokens, inputs):
    """In one program's sums, or in those of several."""
    weights, _ = packed_weight("int8", 36, inputs, 0)
    levels, bias = randn(tokens, inputs).mul(20).to(torch.int8), randn(36, seed=2).half()
    x_scale, act = torch.tensor([1e-3], device=DEVICE), {"activation": kind}
    exact = levels.double() @ weights["mlp.fc.int8"].double().T * 1e-3
    expected = exact * weights["mlp.fc.weights_scaling_factor"] + bias
    if kind != "none":
        expected = blocks.activate(spec(activation=kind), expected)
    half, multiply = (weights, "mlp.fc", levels, bias, torch.float16), product_of(tokens)
    actual = multiply(*half, x_scale=x_scale, **act)
    assert relative_error(actual, expected) < 1e-3
    rounding = launch.Rounding(torch.tensor([0.02], device=DEVICE), None, "int8")
    levels = multiply(*half, x_scale=x_scale, **act, rounding=rounding)
    assert torch.equal(levels, launch.quantize(actual, rounding, levels=True))


def in_int8(tokens, width):
    hidden = torch.zeros(1, tokens, width, device=DEVICE)
    scale = torch.tensor([0.1], device=DEVICE)
    return launch.Rounding(scale, None, "int8", torch.int8, hidden)


def lost_rows(rounding):
    """The tokens whose hidden states have a NaN."""
    return rounding.lost[0].isnan().any(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "what",
    ["norm", "quantize", "activate", "product", "few tiles", "matvec", "tiles", "integers"],
)
def test_int8_loses_no_nan(what):
    """It goes into the token's hidden states, whose other tokens keep theirs."""
    one = what in ("matvec", "tiles", "integers")
    tokens, rounding = (1, 0) if one else (3, 2), in_int8(3, 48)
    x = randn(tokens[0], 64)
    x[tokens[1], 5] = torch.nan
    calls = {
        "norm": lambda x: launch.norm("rms_norm", x, None, x.new_ones(64), None, 1e-5, rounding),
        "quantize": lambda x: launch.quantize(x, rounding, levels=True),
        "activate": lambda x: launch.activate("swiglu", x, None, rounding),
        "product": lambda x: product(packed_weight("e4m3", 18, 64, 0)[0], x),
        "few tiles": lambda x: product(packed_weight("int4", 32, 64, 0)[0], x),
        "matvec": lambda x: matvec({"mlp.fc.weight": randn(8, 64)}, x),
        "tiles": lambda x: matvec(packed_weight("int4", 32, 64, 0)[0], x),
        "integers": lambda x: matvec(packed_weight("int8", 16, 64, 0)[0], x.half()),
    }

    def matvec(weights, x, multiply=linears.matvec):
        return multiply(weights, "mlp.fc", x, None, x.dtype, rounding=rounding)

    def product(weights, x):
        return matvec(weights, x, linears.product)

    assert calls[what](x.nan_to_num(1.0)).dtype == torch.int8
    assert lost_rows(rounding) == []
    calls[what](x)
    assert lost_rows(rounding) == [tokens[1]]


@pytest.mark.parametrize("tokens", [1, 3])
def test_linears_as_directories_have_them(tokens):
    """Smoothed, with inputs rounded by the token, and in parts that differ in these."""
    weights, _ = packed_weight("int4", 32, 64, 32)
    weights["mlp.fc.smoothing"] = randn(64, seed=3)
    other = {
        "mlp.fc.weight": randn(6, 64, seed=4),
        "mlp.fc.inputs_int8_token": torch.empty(0, device=DEVICE),
    }
    both = {
        f"mlp.fc.{n}{name[6:]}": t for n, w in enumerate((weights, other)) for name, t in w.items()
    }
    x = randn(1, tokens, 64)
    for each, rows in ((weights, 32), (other, 6), (both, 38)):
        bias = randn(rows, seed=5)
        expected = quantized.linear(each, "mlp.fc", x, bias)
        assert relative_error(fused._linear(each, "mlp.fc", x, bias, x), expected) < 2e-6


def test_tokens_choose_their_experts():
    scores = randn(40, 6)
    scores[0] = 1.0  # ties go to the first
    scores[1, 2:] = scores[1, 1]
    expected = blocks.route(scores, 0.3)
    chosen, shares = linears.route(scores, 0.3)
    assert torch.equal(chosen, expected[0])
    assert torch.allclose(shares, expected[1], atol=1e-6)
    scores[2, 4] = torch.nan
    assert linears.route(scores, 0.3)[1][2].isnan().all()


@pytest.mark.parametrize(
    ("grid", "group"),
    [(None, 0), ("e4m3", 0), ("int8", 0), ("int4", 0), ("int4", 32), ("e2m1", 16)],
)
def test_experts(grid, group):
    """Those of this rank alone; the others of a token leave it as it is."""
    inputs, inner, experts, first = 32, 32, 3, 2
    if grid is None:
        fc, proj = randn(experts, 2 * inner, inputs, seed=1), randn(experts, inputs, inner, seed=2)
        weights = {"mlp.fc.weight": fc, "mlp.proj.weight": proj}
    else:
        weights, fc = packed_weight(grid, 2 * inner, inputs, group, (experts,))
        other, proj = packed_weight(grid, inputs, inner, group, (experts,))
        weights |= {name.replace("fc", "proj"): tensor for name, tensor in other.items()}
    values = {"mlp.fc.weight": fc.double(), "mlp.proj.weight": proj.double()}
    x, shares = randn(3, inputs) / 100, torch.rand(3, 2, device=DEVICE)
    chosen = torch.tensor([[0, 1], [2, 4], [3, 0]], device=DEVICE)
    expected = blocks.rank_mixture(
        range(first, first + experts), values, x.double(), chosen, shares.double()
    )
    actual = fused.rank_experts(weights, x, chosen, shares, first, x)
    assert relative_error(actual, expected) < 2e-6
    assert (actual[0] == 0).all()
