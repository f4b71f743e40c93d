"""Every kernel of generation on a GPU against plain PyTorch, in Triton's interpreter or on a GPU.

``blocks`` and ``quantized`` are held against the source models elsewhere.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from checkpoints_by_hand import relative_error
from torch.nn import functional

from phireg.executor import attention as attend
from phireg.executor import blocks, quantized
from phireg.executor.cuda import (
    attention,
    fused,
    head_attention,
    integers,
    kernels,
    launch,
    linears,
    products,
    tiles,
)
from phireg.executor.finite import NO_TOKEN
from phireg.executor.levels import Levels
from phireg.reader.schemes import Quantization
from phireg.reader.spec import BlockSparse, Rope, parse_spec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_adds_what_is_pending(kind, residual):
    x, delta = 3 * randn(2, 3, 70) + 1, randn(2, 3, 70, seed=1)
    weight, bias = randn(70, seed=2), randn(70, seed=3) if kind == "layer_norm" else None
    total = x + delta if residual else x.clone()
    if bias is None:
        expected = functional.rms_norm(total, (70,), eps=1e-2) * weight
    else:
        expected = functional.layer_norm(total, (70,), weight, bias, 1e-2)
    u = launch.norm(kind, x, delta if residual else None, weight, bias, 1e-2)
    assert relative_error(u, expected) < 1e-6
    assert torch.equal(x, total)
    rounding = launch.Rounding(torch.tensor([0.03], device=DEVICE), None, "int8")
    levels = launch.norm(kind, x, None, weight, bias, 1e-2, rounding)
    assert torch.equal(levels, launch.quantize(u, rounding, levels=True))


@pytest.mark.parametrize("grid", ["fp8", "int8"])
@pytest.mark.parametrize("smooth", [False, True])
def test_quantize_hits_the_same_values_of_the_grid(grid, smooth):
    """Ties, values below the smallest normal number, and values beyond the end among them."""
    scale = torch.tensor([0.25], device=DEVICE)
    ties = torch.cat((torch.arange(-70, 70) / 64, torch.arange(-300, 300) / 8))
    x = torch.cat((randn(900).cpu() * 20, ties, torch.tensor([0.0, 1e-9, -1e-9, 1e6, -1e6])))
    x = torch.cat((x, torch.tensor([torch.inf, -torch.inf, torch.nan]))).to(DEVICE)[None]
    smoothing = 2.0 ** torch.arange(x.shape[-1], device=DEVICE).remainder(3) if smooth else None
    expected = quantized.fake_quantize(x if smoothing is None else x * smoothing, scale, grid)
    assert expected.isnan().sum() == 1
    rounding = launch.Rounding(scale, smoothing, grid)
    actual = launch.quantize(x, rounding, levels=False)
    assert torch.equal(actual.nan_to_num(7e6), expected.nan_to_num(7e6))
    levels = launch.quantize(x, rounding, levels=True)
    assert torch.equal((levels * scale).nan_to_num(7e6), expected.nan_to_num(7e6))


ACTIVATIONS = [("swiglu", None), ("gegelu", None), ("gegelu", 0.4), ("gelu_tanh", None)]


def spec(**changes):
    values = {
        "architecture": "Phi3ForCausalLM", "dtype": "float32", "vocab_size": 10, "hidden_size": 48,
        "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_size": 12, "hidden_act": "swiglu",
        "max_position_embeddings": 64, "rotary_base": 100.0, "rotary_pct": 1.0,
    }  # fmt: skip
    return replace(parse_spec(values), **changes)


@pytest.mark.parametrize(("kind", "limit"), ACTIVATIONS)
def test_activations(kind, limit):
    z = randn(2, 3, 2 * 37)
    expected = blocks.activate(spec(activation=kind, gegelu_limit=limit), z)
    assert relative_error(launch.activate(kind, z, limit), expected) < 1e-6
    rounding = launch.Rounding(torch.tensor([0.02], device=DEVICE), None, "fp8")
    levels = launch.activate(kind, z, limit, rounding)
    actual = launch.activate(kind, z, limit)
    assert torch.equal(levels, launch.quantize(actual, rounding, levels=True))
    z[0, 0, ::5] = torch.nan
    expected = blocks.activate(spec(activation=kind, gegelu_limit=limit), z)
    assert torch.equal(launch.activate(kind, z, limit).isnan(), expected.isnan())
    assert 0 < expected.isnan().sum() < expected.numel()


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


@pytest.mark.parametrize("vocab_size", [7, 2051])
def test_the_best_token(vocab_size):
    logits = randn(5, vocab_size + 1)[:, :-1]  # rows of padding's vocabulary
    logits[0, [3, 5]] = 9.0  # the first of equal ones
    logits[1, -1], logits[1, 0] = 9.0, -torch.inf
    logits[2, 4], logits[3, 0], logits[4] = torch.nan, torch.inf, -torch.inf
    token = torch.full((5,), 77, device=DEVICE)
    for _ in range(2):  # its counters are as before
        launch.choose(logits, token)
        assert token.tolist() == [3, vocab_size - 1, NO_TOKEN, NO_TOKEN, NO_TOKEN]
    chosen = randn(40, vocab_size, seed=1)
    token = torch.empty(40, dtype=torch.int64, device=DEVICE)
    launch.choose(chosen, token)
    assert torch.equal(token, chosen.argmax(-1))


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


@pytest.mark.parametrize("rotated", [12, 6])  # all dimensions, and half of them
@pytest.mark.parametrize("grid", [None, "fp8", "int8"])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotation_into_the_cache(rotated, grid, per_row):
    batch, tokens, capacity, first = 2, 3, 8, 4
    model = spec(rope=Rope(rotated, 100.0), quantization=Quantization(weights=None, kv_cache=grid))
    qkv = randn(batch, tokens, (4 + 2 * 2) * 12)
    tables = blocks.rotary_tables(model.rope, 20, False, torch.device(DEVICE))
    position = torch.arange(tokens) + torch.tensor([[2], [5]] if per_row else [[2]])
    rotary = tuple(table[position.to(DEVICE)][:, None] for table in tables)
    scale = torch.tensor([0.05], device=DEVICE) if grid else None
    cache = tuple(torch.full((batch, 2, capacity, 12), 7.0, device=DEVICE) for _ in range(2))

    rows = qkv.view(batch, tokens, 8, 12).transpose(1, 2)
    query, key, value = rows.split([4, 2, 2], dim=1)
    rotated_query, key = blocks.rotate(query, rotary), blocks.rotate(key, rotary)
    if grid:
        key, value = (quantized.fake_quantize(x, scale, grid) for x in (key, value))
    slot = torch.tensor([first], device=DEVICE)
    actual, *seen = launch.rotate_into(model, qkv, rotary, cache, slot, scale)

    assert all(part is kept for part, kept in zip(seen, cache, strict=True))
    assert relative_error(actual, rotated_query) < 1e-6
    if grid:
        dtype = torch.int8 if grid == "int8" else torch.float8_e4m3fn
        levels = tuple(torch.zeros_like(kept, dtype=dtype) for kept in cache)
        _, *seen = launch.rotate_into(model, qkv, rotary, levels, slot, scale)
        for kept, level, values in zip(cache, levels, seen, strict=True):
            new = slice(first, first + tokens)
            assert torch.equal(level[:, :, new].float() * scale, kept[:, :, new])
            assert torch.equal(values, kept[:, :, new])
        qkv[0, 1, 4 * 12] = qkv[1, 2, -1] = torch.nan  # a key, and a value
        _, *seen = launch.rotate_into(model, qkv, rotary, levels, slot, scale)
        assert [x.isnan().any(-1).nonzero().tolist() for x in seen] == [[[0, 0, 1]], [[1, 1, 2]]]
    for kept, expected in zip(cache, (key, value), strict=True):
        # A last bit before the grid can be one step of it after.
        wrong = (kept[:, :, first : first + tokens] - expected).abs() > 1e-5
        assert wrong.sum() <= (1 if grid else 0)
        kept[:, :, first : first + tokens] = 7.0
        assert (kept == 7.0).all()


SPARSE = BlockSparse(
    block_size=4, num_local_blocks=2, vertical_stride=3, head_step=1, dense_every=2
)


def step_of(model, batch, slot, pads):
    """A new token's product of qkv, the tables of every slot's angles, and the token's own."""
    width = (model.rank_heads + 2 * model.rank_kv_heads) * model.head_size
    short, long = (
        blocks.rotary_tables(model.rope, 96, long, torch.device(DEVICE)) for long in (False, True)
    )
    positions = (slot - pads).tolist()
    own = [
        (cos[p], sin[p])
        for p in positions
        for cos, sin in [long if p + 1 > model.rope.original else short]
    ]
    rotary = tuple(torch.stack(angles)[:, None, None] for angles in zip(*own, strict=True))
    tables = tuple(torch.stack(pair) for pair in zip(short, long, strict=True))
    return randn(batch, 1, width), tables, rotary


@pytest.mark.parametrize(
    ("splits", "batch", "kv_heads", "group", "pattern"),
    [
        (16, 1, 1, 4, SPARSE), (8, 1, 2, 3, None), (2, 3, 2, 1, SPARSE),
        (1, 3, 2, 3, None), (1, 3, 2, 3, SPARSE), (1, 3, 2, 1, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("slot", [3, 64, 90])
def test_one_token_enters_the_cache_and_attends_to_it(
    splits, batch, kv_heads, group, pattern, slot, monkeypatch
):
    monkeypatch.setattr(launch, "_processors", lambda device: splits * batch * kv_heads // 2)
    heads, size, capacity, rank = group * kv_heads, 12, 96, 1
    pads = torch.tensor([0, 2, 1][:batch], device=DEVICE)
    model = spec(
        num_heads=2 * heads, num_kv_heads=2 * kv_heads, tp_size=2, sparse=pattern,
        rope=Rope(8, 100.0, (1.0, 1.1, 1.2, 1.3), (2.0, 3.0, 4.0, 5.0), 1.1, 1.3, 64),
    )  # fmt: skip
    qkv, tables, rotary = step_of(model, batch, slot, pads)
    cache = (
        3 * randn(batch, kv_heads, capacity, size, seed=1),
        randn(batch, kv_heads, capacity, size, seed=2),
    )
    rows = qkv.view(batch, 1, heads + 2 * kv_heads, size).transpose(1, 2)
    query, key, value = rows.split([heads, kv_heads, kv_heads], dim=1)
    new = blocks.rotate(key, rotary), value
    keys, values = (
        torch.cat((kept[:, :, :slot], x), 2) for kept, x in zip(cache, new, strict=True)
    )
    mask = attend.slot_mask(model, pattern is not None, rank, pads)
    expected = blocks.masked_attention(
        blocks.rotate(query, rotary), keys, values, model.attention_scale, mask
    )
    expected = expected.transpose(1, 2).flatten(2)
    for kept in cache:
        kept[:, :, slot:] = torch.nan  # nothing may look there
    place = (model, tables, torch.tensor([slot], device=DEVICE), pads, pattern, rank * heads)
    actual = launch.attend_step(*place, qkv, cache)
    assert relative_error(actual, expected) < 1e-5
    for kept, x in zip(cache, new, strict=True):
        assert relative_error(kept[:, :, slot : slot + 1], x) < 1e-6
        assert kept[:, :, slot + 1 :].isnan().all()
    rounding = launch.Rounding(torch.tensor([0.02], device=DEVICE), None, "fp8")
    levels = launch.attend_step(*place, qkv, cache, None, rounding)
    assert torch.equal(levels, launch.quantize(actual, rounding, levels=True))
    stored = replace(rounding, dtype=torch.float8_e4m3fn)
    kept = launch.attend_step(*place, qkv, cache, None, stored)
    assert torch.equal(kept.float(), levels)
    assert not launch.counters(torch.empty(0, device=DEVICE).device).any()


# Triton's interpreter multiplies bfloat16's bits as integers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_whose_attention_int8_does_not_hold_is_lost(dtype, monkeypatch):
    """Of the splits of a row's heads, the last to arrive says so."""
    monkeypatch.setattr(launch, "_processors", lambda device: 16)
    slot, pads = 70, torch.zeros(2, dtype=torch.int64, device=DEVICE)
    model = spec(rope=Rope(12, 100.0, original=64))
    qkv, tables, _ = step_of(model, 2, slot, pads)
    qkv = qkv.to(dtype)
    qkv[1, 0, 13] = torch.nan  # the second query
    cache = tuple(randn(2, 2, 96, 12, seed=n, dtype=dtype) for n in (1, 2))
    place = (model, tables, torch.tensor([slot], device=DEVICE), pads, None, 0, qkv, cache, None)
    smoothing = torch.linspace(0.5, 2, 48).to(DEVICE, dtype)
    scale, hidden = torch.tensor([0.02], device=DEVICE), torch.zeros(2, 1, 48, device=DEVICE)
    rounding = launch.Rounding(scale, smoothing, "int8", torch.int8, hidden)
    levels = launch.attend_step(*place, rounding)
    assert hidden[1].isnan().any()
    assert not hidden[0].any()
    y = launch.attend_step(*place)
    assert y.isnan().nonzero()[:, 2].tolist() == list(range(12, 24))
    expected = quantized.fake_quantize(y * smoothing, scale, "int8") / scale
    assert (levels - expected)[~y.isnan()].abs().max() <= (1e-3 if dtype == torch.float32 else 1)


@pytest.mark.parametrize(("kv_heads", "size"), [(2, 12), (4, 12), (4, 40)])  # 40 in words
@pytest.mark.parametrize("grid", ["int8", "fp8"])
def test_one_token_attends_to_a_cache_of_levels(grid, kv_heads, size, monkeypatch):
    """As to one of the values that the levels stand for."""
    monkeypatch.setattr(launch, "_processors", lambda device: 2)  # heads of their own: one split
    slot, pads = 36, torch.zeros(1, dtype=torch.int64, device=DEVICE)
    model = spec(
        num_kv_heads=kv_heads, head_size=size, rope=Rope(size, 100.0, original=64),
        quantization=Quantization(weights=None, kv_cache=grid),
    )  # fmt: skip
    qkv, tables, _ = step_of(model, 1, slot, pads)
    dtype = torch.int8 if grid == "int8" else torch.float8_e4m3fn
    levels = tuple((40 * randn(1, kv_heads, 64, size, seed=n)).to(dtype) for n in (1, 2))
    values = tuple(kept.float() * 0.05 for kept in levels)
    place = (model, tables, torch.tensor([slot], device=DEVICE), pads, None, 0, qkv)
    scale = torch.tensor([0.05], device=DEVICE)
    expected = launch.attend_step(*place, values, scale)
    actual = launch.attend_step(*place, levels, scale)
    assert relative_error(actual, expected) < 1e-6
    halves = tuple(kept.half() for kept in values)
    actual = launch.attend_step(*place[:-1], qkv.half(), halves, scale)
    assert relative_error(actual.float(), expected) < 2e-3
    for column in (4 * size, -1):  # a key and a value of the token, which int8 has no NaN for
        broken = qkv.clone()
        broken[..., column] = torch.nan
        actual = launch.attend_step(*place[:-1], broken, levels, scale)
        assert actual.isnan().any()


def test_the_kernels_compile_for_real_gpus():
    """For Ampere and Ada, and for Hopper with launches that overlap; the interpreter takes more."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    built = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in built} == {
        name.removesuffix("_kernel")
        for name in (
            *vars(attention),
            *vars(head_attention),
            *vars(integers),
            *vars(kernels),
            *vars(products),
            *vars(tiles),
        )
        if name.endswith("_kernel")
    }
    # What one program may have at most: on GPUs of compute capability 8.6, which have least and run
    # what Ampere runs, and on Hopper.
    room = {"80": 99 * 1024, "89": 99 * 1024, "90": 227 * 1024}
    assert all(int(shared) <= room[capability] for _, capability, shared in built)
