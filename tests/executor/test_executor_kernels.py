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
from checkpoints_by_hand import relative_error
from torch.nn import functional

from phireg.executor import attention as attend
from phireg.executor import blocks, quantized
from phireg.executor.cuda import kernels, launch
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
    actual = launch.quantize(x, scale, smoothing, grid, stored=False)
    assert torch.equal(actual.nan_to_num(7e6), expected.nan_to_num(7e6))


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
    actual = launch.matvec(x, weight, added, torch.float32, None, kind, limit)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 1e-6


def test_matvec_of_stored_values_is_scaled():
    x, weight = randn(1, 1, 24), randn(26, 24, seed=1)
    scales = (torch.tensor([0.5], device=DEVICE), torch.tensor([3.0], device=DEVICE))
    expected = functional.linear(x, weight) * 1.5
    assert relative_error(launch.matvec(x, weight, None, torch.float32, scales), expected) < 1e-6


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
    actual = launch.rotate_into(model, qkv, rotary, cache, slot, scale)

    assert relative_error(actual, rotated_query) < 1e-6
    for kept, expected in zip(cache, (key, value), strict=True):
        # A last bit before the grid can be one step of it after.
        wrong = (kept[:, :, first : first + tokens] - expected).abs() > 1e-5
        assert wrong.sum() <= (1 if grid else 0)
        kept[:, :, first : first + tokens] = 7.0
        assert (kept == 7.0).all()


SPARSE = BlockSparse(
    block_size=4, num_local_blocks=2, vertical_stride=3, head_step=1, dense_every=2
)


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (1, 2), (3, 2)])  # 8, 4 and 1 splits
@pytest.mark.parametrize("pattern", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("slot", [3, 37, 90])
def test_one_token_attends_to_the_cache(batch, kv_heads, pattern, slot, monkeypatch):
    monkeypatch.setattr(launch, "_processors", lambda device: 4)
    heads, size, capacity, rank = 3 * kv_heads, 12, 96, 1
    query = randn(batch, 1, heads, size).transpose(1, 2)
    cache = (
        3 * randn(batch, kv_heads, capacity, size, seed=1),
        randn(batch, kv_heads, capacity, size, seed=2),
    )
    pads = torch.tensor([0, 2, 1][:batch], device=DEVICE)
    model = spec(num_heads=2 * heads, num_kv_heads=2 * kv_heads, tp_size=2, sparse=pattern)
    mask = attend.slot_mask(model, pattern is not None, rank, pads)
    keys, values = (kept[:, :, : slot + 1] for kept in cache)
    expected = blocks.masked_attention(query, keys, values, 0.4, mask).transpose(1, 2).flatten(2)
    for kept in cache:
        kept[:, :, slot + 1 :] = torch.nan  # nothing may look there
    actual = launch.attend_cache(
        query, cache, torch.tensor([slot], device=DEVICE), pads, 0.4, pattern, rank * heads
    )
    assert relative_error(actual, expected) < 1e-5


def test_the_kernels_compile_for_real_gpus():
    """For Ampere, and for Hopper with launches that overlap; the interpreter takes more."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    built = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in built} == {
        name.removesuffix("_kernel") for name in vars(kernels) if name.endswith("_kernel")
    }
    # What one program may have at most: on GPUs of compute capability 8.6 and 8.9, which have least
    # and run what Ampere runs, and on Hopper.
    room = {"80": 99 * 1024, "90": 227 * 1024}
    assert all(int(shared) <= room[capability] for _, capability, shared in built)
