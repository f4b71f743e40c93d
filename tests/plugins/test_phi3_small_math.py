"""reference.py against the float64 loops of naive_phi3_small.py, which show planted mistakes."""

import numpy as np
import pytest
import torch
from family_checks import without
from naive_phi3_small import MISTAKES, Naive
from phireg_plugins.phi3_small import reference
from tiny_phi3_small import LONG, LONG_ROPE, TINY, random_ids, random_tensors

CASES = {
    "8k": TINY,
    "8k, all sparse": {**TINY, "dense_attention_every_n_layers": 0},
    "8k, dense unset": {**TINY, "dense_attention_every_n_layers": None},
    "8k, all dense": {**TINY, "dense_attention_every_n_layers": 1},
    "one pattern": {**TINY, "blocksparse_homo_head_pattern": True},
    "fewer heads than stride": {**TINY, "blocksparse_vert_stride": 13},
    "one local block": {**TINY, "blocksparse_num_local_blocks": 1, "blocksparse_block_size": 3},
    "multi-head": {**TINY, "num_key_value_heads": 6},
    "multi-query": {**TINY, "num_key_value_heads": 1},
    "multipliers": {**TINY, "mup_attn_multiplier": 1.7, "mup_embedding_multiplier": -1.0},
    "no muP scale": {**TINY, "mup_use_scaling": False, "mup_width_multiplier": 3.0},
    "position scale": {**TINY, "rope_position_scale": 0.3, "rope_embedding_base": 100.0},
    "128k": LONG,
    "128k, no mscale": {**LONG, "rope_scaling": without(LONG_ROPE, "short_mscale", "long_mscale")},
}


def build(config, dtype=torch.float64, seed=0):
    model = reference.Phi3SmallForCausalLM(reference.Phi3SmallConfig(**config)).to(dtype).eval()
    tensors = random_tensors(config, seed)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model, tensors


def relative(actual, expected, of=np.max):
    """Largest error (or another summary of the absolute errors) in standard deviations."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected)
    assert actual.shape == expected.shape
    return of(np.abs(actual - expected)) / expected.std()


def root_mean_square(values):
    return np.sqrt(np.mean(values**2))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(case):
    config = CASES[case]
    model, tensors = build(config)
    in_float32, _ = build(config, torch.float32)
    for length in (1, 8, 9, 20, 21, 30):  # local window 8, long rope from 21: at and beyond each
        ids = random_ids(config, length)
        expected = Naive(config, tensors)(ids.tolist())
        assert relative(model(ids[None]).logits[0], expected) < 1e-9
        logits = in_float32(ids[None]).logits
        assert logits.dtype == torch.float32
        assert relative(logits[0], expected, root_mean_square) < 1e-5


@pytest.mark.parametrize("config", [TINY, LONG], ids=["8k", "128k"])
@torch.no_grad()
def test_hidden_states_are_layer_inputs_and_the_final_norm(config):
    model, tensors = build(config)
    ids = random_ids(config, 25)
    naive = Naive(config, tensors)
    naive(ids.tolist())
    states = model(ids[None], output_hidden_states=True).hidden_states
    assert len(states) == config["num_hidden_layers"] + 1
    for actual, expected in zip(states, naive.states, strict=True):
        assert relative(actual[0], expected) < 1e-9
    assert model(ids[None]).hidden_states is None


# Where a mistake cannot show in the plain 8k and 128k cases, the case where it does.
SHOWN_BY = {
    "stripe step 1": "fewer heads than stride",
    "attention multiplier dropped": "multipliers",
    "position scale dropped": "position scale",
    "mscale dropped": "128k",
    "mscale squared": "128k",
    "short and long exchanged": "128k",
}


@pytest.mark.parametrize("mistake", MISTAKES)
@torch.no_grad()
def test_a_mistake_shows(mistake):
    config = CASES[SHOWN_BY.get(mistake, "8k")]
    model, tensors = build(config)
    ids = random_ids(config, 40)
    first = 5
    mask = (torch.arange(40) >= first).long()[None]
    logits = model(ids[None], attention_mask=mask).logits[0, first:]
    assert relative(logits, Naive(config, tensors)(ids.tolist(), first)[first:]) < 1e-9
    assert relative(logits, Naive(config, tensors, mistake)(ids.tolist(), first)[first:]) > 0.05


@pytest.mark.parametrize("config", [TINY, LONG], ids=["8k", "128k"])
@pytest.mark.parametrize("pieces", [[1] * 34, [9, 9, 9, 3, 1, 3]])
@torch.no_grad()
def test_cache_equals_full_forward(config, pieces):
    if "rope_scaling" in config:  # keys keep their factors, so cross the switch in the first piece
        pieces = [21, *pieces]
    model, _ = build(config)
    ids = random_ids(config, 2, sum(pieces))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    cache, logits, past = None, [], 0
    for size in pieces:
        upto = past + size
        output = model(
            ids[:, past:upto],
            attention_mask=mask[:, :upto],
            past_key_values=cache,
            use_cache=True,
        )
        cache, past = output.past_key_values, upto
        logits.append(output.logits)
    full = model(ids, attention_mask=mask, use_cache=False)
    assert full.past_key_values is None
    pieced = torch.cat(logits, dim=1)
    for row, first in ((0, 0), (1, 6)):
        assert relative(pieced[row, first:], full.logits[row, first:]) < 1e-9


@torch.no_grad()
def test_keys_cached_before_the_switch_keep_the_short_factors():
    model, _ = build(LONG)
    ids = random_ids(LONG, 1, 21)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    mixed = model(ids[:, 20:], past_key_values=cache).logits[0, -1]
    assert relative(mixed, model(ids).logits[0, -1]) > 0.1


@pytest.mark.parametrize("case", ["8k", "fewer heads than stride", "128k"])
@torch.no_grad()
def test_left_padding(case):
    config = CASES[case]
    model, tensors = build(config)
    lengths, total = [30, 29, 22, 11, 1], 30
    ids, mask = random_ids(config, len(lengths), total), torch.zeros(len(lengths), total)
    for row, length in enumerate(lengths):
        mask[row, total - length :] = 1
    logits = model(ids, attention_mask=mask.long()).logits
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        first = total - length
        # Stored with its padding: the rotary angles and the long-rope switch count it.
        expected = Naive(config, tensors)(ids[row].tolist(), first)
        assert relative(logits[row, first:], expected[first:]) < 1e-9
        if config is not LONG or length > 20:  # same regime without the padding: same logits
            alone = model(ids[row : row + 1, first:]).logits[0]
            assert relative(logits[row, first:], alone) < 1e-9


def test_a_mask_of_the_wrong_length_is_refused():
    model, _ = build(TINY)
    with pytest.raises(ValueError):
        model(random_ids(TINY, 1, 5), attention_mask=torch.ones(1, 4))


def test_published_stripes():
    """64-token blocks, 16 local, stride 8, 32 heads: which blocks the last query sees."""
    _, sparse = reference.attention_masks(
        reference.Phi3SmallConfig(), None, 40 * 64 - 1, 1, torch.device("cpu")
    )
    assert sparse.shape == (1, 32, 1, 40 * 64)
    blocks = sparse[0, :, 0].unflatten(-1, (40, 64))
    assert (blocks.all(-1) == blocks.any(-1)).all()
    remote = {0: [7, 15, 23], 1: [6, 14, 22], 7: [0, 8, 16], 8: [7, 15, 23], 31: [0, 8, 16]}
    for head, expected in remote.items():
        assert blocks[head, :, 0].nonzero()[:, 0].tolist() == [*expected, *range(24, 40)]


@pytest.mark.parametrize("length", [8, 17])
def test_every_query_attends_to_something(length):
    """A softmax over nothing is NaN in some PyTorch releases; padding must not make one."""
    tokens = torch.ones(3, length, dtype=torch.long)
    tokens[0, :5], tokens[1, 5:], tokens[2] = 0, 0, 0
    config = reference.Phi3SmallConfig(**TINY)
    for mask in reference.attention_masks(config, tokens, 0, length, torch.device("cpu")):
        assert mask.any(-1).all()
        assert not (mask & (torch.arange(length) > torch.arange(length)[:, None])).any()


@torch.no_grad()
def test_gegelu_leaves_infinities():
    inf = float("inf")
    x = [3.0, 2.0, -inf, -3.0, 0.25, inf, inf, -inf, inf, 0.0]
    x = torch.tensor(x, dtype=torch.float64)
    y = reference.gegelu(x, 0.5)
    by_hand = 0.5 / (1 + np.exp(-1.702 * 0.5)) * 1.5
    assert y[0].item() == pytest.approx(by_hand, rel=1e-12)
    assert y[1].isnan()  # -inf * sigmoid(-inf)
    assert y[2:].tolist() == [inf, -inf, inf]
