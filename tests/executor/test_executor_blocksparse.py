"""The block-sparse mask and its tiles against the formula written out in plain loops."""

import dataclasses

import pytest
import torch
from tiny_sources import phi3_small, relative_error, write_checkpoint

from phireg.executor import blocksparse, load
from phireg.executor.attend import prompt_attention
from phireg.executor.blueprint import BlockSparse

torch.set_num_threads(2)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def allowed(pattern, head, i, j):
    """The published rule for query i and key j."""
    block = pattern.block_size
    near = i // block - j // block < pattern.num_local_blocks
    on_stripe = (j // block + head * pattern.head_step + 1) % pattern.vertical_stride == 0
    return j <= i and (near or on_stripe)


def whole_mask(pattern, heads, length):
    return torch.tensor(
        [[[allowed(pattern, h, i, j) for j in range(length)] for i in range(length)] for h in heads]
    )


def attention(query, key, value, mask, scale):
    """softmax(q k / ...) v in float64, head by head."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for h in range(query.shape[1]):
        scores = query[:, h].double() @ key[:, h // group].double().transpose(1, 2) * scale
        weights = scores.masked_fill(~mask[:, h], -torch.inf).softmax(-1)
        outputs.append(weights @ value[:, h // group].double())
    return torch.stack(outputs, 1)


PATTERNS = {
    "16": BlockSparse(16, 2, 3, 1, 2),
    "32-step-2": BlockSparse(32, 1, 7, 2, 2),
    "64-homo": BlockSparse(64, 1, 2, 0, 2),
    "128": BlockSparse(128, 1, 2, 1, 2),
}


@pytest.mark.parametrize("length", [130, 300])
@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_hold_what_is_visible_and_no_more(name, length):
    pattern, heads = PATTERNS[name], range(3, 7)
    padded = 512
    mask = blocksparse.prefill_block_mask(pattern, length, padded, 3, 4, "cpu")
    wanted = whole_mask(pattern, heads, padded)
    wanted[:, -(-length // 64) * 64 :] = False  # tiles of padding alone have no work
    tiles = wanted.unflatten(2, (-1, 64)).unflatten(1, (-1, 64))
    some, full = tiles.any(4).any(2), tiles.all(4).all(2)
    part = torch.zeros_like(some)
    whole = torch.zeros_like(some)
    for flags, counts, indices in (
        (part, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for h, row in torch.cartesian_prod(torch.arange(4), torch.arange(8)).tolist():
            flags[h, row, indices[0, h, row, : counts[0, h, row]].long()] = True
    assert torch.equal(whole, full)
    assert torch.equal(part, some & ~full)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_gpu_prefill_uncompiled(name, tmp_path):
    model = phi3_small(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    blueprint = dataclasses.replace(
        load(write_checkpoint(model, tmp_path, 2)).blueprint, sparse=PATTERNS[name]
    )
    generator = torch.Generator().manual_seed(0)
    length, pads = 290, (0, 37)
    query = torch.randn(2, 4, length, 8, generator=generator) * 3
    key, value = torch.randn(2, 2, 2, length, 8, generator=generator)
    attend = prompt_attention(blueprint, 0, 1, length, pads, torch.device("cuda"))
    got = attend(query, key, value)
    plain = prompt_attention(blueprint, 0, 1, length, pads, torch.device("cpu"))(query, key, value)
    for row, pad in enumerate(pads):
        part = (slice(row, row + 1), slice(None), slice(pad, None))
        mask = whole_mask(PATTERNS[name], range(4, 8), length - pad)[None]
        wanted = attention(query[part], key[part], value[part], mask, blueprint.attention_scale)
        assert relative_error(got[part].double(), wanted) < 1e-5
        assert relative_error(plain[part].double(), wanted) < 1e-5
    # a prompt without padding goes through at once
    attend = prompt_attention(blueprint, 0, 1, length, (), torch.device("cuda"))
    assert relative_error(attend(query, key, value)[:1], got[:1]) < 1e-5


def test_short_prompts_and_dense_layers_are_plain_causal():
    pattern = PATTERNS["16"]
    assert blocksparse.always_dense(pattern, 32)
    assert whole_mask(pattern, [0], 32)[0].equal(torch.ones(32, 32).tril().bool())
    assert not blocksparse.always_dense(pattern, 33)
    assert not whole_mask(pattern, [0], 33)[0].equal(torch.ones(33, 33).tril().bool())
