"""Packed weights against the definition of their grids, byte by byte."""

import itertools

import pytest
import torch

from phireg.executor.levels import Levels, find_packed, packed_bytes

# Written out from the format: sign, two bits of the exponent with bias 1, one of the mantissa.
E2M1 = [
    sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    for sign in (1, -1)
    for exponent in range(4)
    for mantissa in range(2)
]


def levels_of(grid, *shape):
    """Codes of every level of a grid, and the levels."""
    bits = 8 if grid == "int8" else 4
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(0))
    table = torch.tensor(E2M1 if grid == "e2m1" else list(range(-(2**bits) // 2, 2**bits // 2)))
    return codes, table[codes].to(torch.float8_e4m3fn if grid == "e2m1" else torch.int8)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_int8_lies_as_it_is(stack):
    _, levels = levels_of("int8", *stack, 2, 40)
    scale = torch.rand(*stack, 2)
    kept = Levels("int8", levels, scale).packed("mlp.fc")
    data = kept["mlp.fc.int8"]
    assert torch.equal(data, levels)
    assert data.nbytes == packed_bytes("int8", tuple(levels.shape))
    back = find_packed(kept, "mlp.fc").levels(40)
    assert torch.equal(back.levels, levels)
    assert torch.equal(back.values(torch.float32), levels * scale[..., None])


@pytest.mark.parametrize("grid", ["int4", "e2m1"])
@pytest.mark.parametrize("inputs", [144, 64])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_tiles_of_four_bits(grid, inputs, stack):
    """Each level's bits by hand, and each scale's place; and back again."""
    codes, levels = levels_of(grid, *stack, 32, inputs)
    scale, groups = torch.rand(*stack, 32), torch.rand(*stack, 32, inputs // 16) + 0.1
    groups = groups.to(levels.dtype if grid == "e2m1" else torch.bfloat16)
    kept = Levels(grid, levels, scale, groups).packed("mlp.fc")
    data = kept[f"mlp.fc.{grid}"]
    assert (data.dtype, data.numel()) == (torch.uint8, packed_bytes(grid, tuple(codes.shape)))
    pairs = -(-inputs // 128)
    filled = torch.zeros(*stack, 32, 128 * pairs, dtype=torch.int64)
    filled[..., :inputs] = codes
    words = data.view(torch.int32).long()
    for g, t, j, late, row, half in itertools.product(*map(range, (8, 4, 4, 2, 2, 2))):
        actual = words[..., 16 * g + 4 * t + j] >> (16 * half + 8 * late + 4 * row) & 15
        expected = filled[..., g + 8 * row :: 16, 16 * j + 8 * late + 2 * t + half :: 64]
        assert torch.equal(actual, expected)
    if grid == "e2m1":
        stored = kept["mlp.fc.group_scaling_factor"].float()
        filled = torch.zeros(*stack, 32, 8 * pairs)
        filled[..., : inputs // 16] = groups.float()
        for g, t, row, other in itertools.product(*map(range, (8, 4, 2, 2))):
            expected = filled[..., g + 8 * row :: 16, 2 * t + other :: 8]
            assert torch.equal(stored[..., 16 * g + 4 * t + 2 * row + other], expected)
    back = find_packed(kept, "mlp.fc").levels(inputs)
    assert torch.equal(back.levels.float(), levels.float())
    assert torch.equal(back.scale, scale)
    expected = levels.double() * scale[..., None] * groups.double().repeat_interleave(16, -1)
    assert torch.allclose(back.values(torch.float32).double(), expected, rtol=1e-6)


def test_no_packed_weight():
    assert find_packed({"mlp.fc.weight": torch.zeros(2, 2)}, "mlp.fc") is None
