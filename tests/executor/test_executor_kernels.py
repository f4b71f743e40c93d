"""Every kernel of generation on a GPU against plain PyTorch, in Triton's interpreter or on a GPU.

Those of linears and of attention have modules of their own. ``blocks`` and ``quantized`` are held
against the source models elsewhere.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints_by_hand import relative_error
from kernel_cases import ACTIVATIONS, DEVICE, randn, spec
from torch.nn import functional

from phireg.executor import blocks, quantized
from phireg.executor.cuda import (
    attention,
    head_attention,
    integers,
    kernels,
    launch,
    products,
    tiles,
)
from phireg.executor.finite import NO_TOKEN


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
