"""The kernels of a cache on a GPU: rotation into it, and one token's attention over it."""

from dataclasses import replace

import pytest
import torch
from checkpoints_by_hand import relative_error
from kernel_cases import DEVICE, randn, spec

from phireg.executor import attention as attend
from phireg.executor import blocks, quantized
from phireg.executor.cuda import launch
from phireg.reader.schemes import Quantization
from phireg.reader.spec import BlockSparse, Rope


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
