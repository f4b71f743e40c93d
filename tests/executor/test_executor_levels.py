"""Packed weights against the definition of their grids, byte by byte."""

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


@pytest.mark.parametrize("grid", ["int8", "int4", "e2m1"])
@pytest.mark.parametrize("inputs", [64, 48])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_words(grid, inputs, stack):
    """Each level's bits by hand; and back again."""
    bits = 8 if grid == "int8" else 4
    run = 16 if grid == "int8" else 32
    codes = torch.randint(2**bits, (*stack, 2, inputs), generator=torch.Generator().manual_seed(0))
    table = torch.tensor(E2M1 if grid == "e2m1" else list(range(-(2**bits) // 2, 2**bits // 2)))
    levels = table[codes].to(torch.float8_e4m3fn if grid == "e2m1" else torch.int8)
    scale, groups = torch.rand(*stack, 2), torch.rand(*stack, 2, inputs // 16).to(levels.dtype)
    kept = Levels(grid, levels, scale, groups).packed("mlp.fc")
    data = kept[f"mlp.fc.{grid}"]
    assert (data.dtype, data.numel()) == (torch.uint8, packed_bytes(grid, tuple(codes.shape)))
    filled = torch.zeros(*stack, 2, -(-inputs // run) * run, dtype=torch.int64)
    filled[..., :inputs] = codes
    words = data.view(torch.int32)
    for word in range(words.shape[-1]):
        for n in range(32 // bits):
            expected = filled[..., word // 4 * run + 4 * n + word % 4]
            assert torch.equal((words[..., word].long() >> bits * n) & (2**bits - 1), expected)
    packed = find_packed(kept, "mlp.fc")
    back = packed.levels(inputs)
    assert torch.equal(back.levels.float(), levels.float())
    assert torch.equal(back.scale, scale)
    expected = levels.double() * scale[..., None] * groups.double().repeat_interleave(16, -1)
    assert torch.allclose(back.values(torch.float32).double(), expected, rtol=1e-6)


def test_no_packed_weight():
    assert find_packed({"mlp.fc.weight": torch.zeros(2, 2)}, "mlp.fc") is None
