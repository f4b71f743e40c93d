"""The block-sparse mask and its kernel against the formula written out in plain loops."""

import dataclasses

import pytest
import torch
from checkpoints_by_hand import relative_error, write_checkpoint
from helpers.tiny_models import phi3_small

from phireg.executor import load
from phireg.executor.attention import always_dense, prompt_attention
from phireg.executor.cuda import launch
from phireg.reader.spec import BlockSparse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    "64-step-3": BlockSparse(64, 2, 5, 3, 2),
    "128": BlockSparse(128, 1, 2, 1, 2),
}


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
@pytest.mark.parametrize("name", PATTERNS)
def test_prompts_of_unequal_lengths(name, device, tmp_path):
    """Through the mask on a CPU, and through the mask or the kernel on a GPU."""
    model = phi3_small(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    spec = dataclasses.replace(
        load(write_checkpoint(model, tmp_path, 2)).spec, sparse=PATTERNS[name]
    )
    length, pads = 290, (0, 37)
    query, key, value = random_rows(2, 4, 2, length, 8, device)
    actual = prompt_attention(spec, 0, 1, length, pads, torch.device(device))(query, key, value)
    check(actual, query, key, value, pads, PATTERNS[name], range(4, 8), spec.attention_scale)


@pytest.mark.parametrize(
    ("name", "length", "pads"),
    [("64-homo", 130, ()), ("64-step-3", 450, (0, 37)), ("128", 200, (199, 3))],
)
def test_the_kernel_of_a_gpu(name, length, pads):
    query, key, value = random_rows(2, 4, 2, length, 12)
    starts = torch.tensor(pads, device=DEVICE) if pads else None
    actual = launch.sparse_attention(query, key, value, PATTERNS[name], starts, 5, 0.3)
    check(actual, query, key, value, pads or (0, 0), PATTERNS[name], range(5, 9), 0.3)
    for row, pad in enumerate(pads):
        assert not actual[row, :, :pad].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # rows whose own blocks are planted
def test_the_kernel_reads_no_block_that_is_not_seen():
    pattern, head, length = PATTERNS["64-step-3"], 6, 64 * 12
    query, key, value = random_rows(1, 1, 1, length, 16)
    seen = whole_mask(pattern, [head], length)[0]
    last = slice(length - 64, None)
    unseen = ~seen[last].any(0)
    assert unseen.sum() >= 6 * 64
    expected = launch.sparse_attention(query, key, value, pattern, None, head, 0.3)[:, :, last]
    for rows in (key, value):
        rows[:, :, unseen.to(rows.device)] = torch.nan
    actual = launch.sparse_attention(query, key, value, pattern, None, head, 0.3)[:, :, last]
    assert torch.equal(actual, expected)


def random_rows(batch, heads, kv_heads, length, size, device=DEVICE):
    """Queries, keys and values as parts of one tensor, heads side by side, as a model has them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch, length, heads + 2 * kv_heads, size, generator=generator)
    query, key, value = rows.to(device).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    return query * 3, key, value


def check(actual, query, key, value, pads, pattern, heads, scale):
    """Against the rule written out, row by row, from each row's first token on."""
    for row, pad in enumerate(pads):
        part = (slice(row, row + 1), slice(None), slice(pad, None))
        mask = whole_mask(pattern, heads, actual.shape[2] - pad)[None].to(actual.device)
        expected = attention(query[part], key[part], value[part], mask, scale)
        assert relative_error(actual[part].double(), expected) < 1e-5


def test_short_prompts_and_dense_layers_are_plain_causal():
    pattern = PATTERNS["16"]
    assert always_dense(pattern, 32)
    assert whole_mask(pattern, [0], 32)[0].equal(torch.ones(32, 32).tril().bool())
    assert not always_dense(pattern, 33)
    assert not whole_mask(pattern, [0], 33)[0].equal(torch.ones(33, 33).tril().bool())
