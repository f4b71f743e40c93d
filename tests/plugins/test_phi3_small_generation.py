"""generate(), recording caches and hooks: what transformers' tools and calibration see."""

import pytest
import torch
from naive_phi3_small import Naive
from test_phi3_small_math import build, relative
from tiny_phi3_small import LONG, TINY, random_ids
from transformers import DynamicCache


def greedy(model, ids, count):
    """One full forward per token, no cache."""
    for _ in range(count):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("config", [TINY, LONG], ids=["8k", "128k"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_greedy_is_the_argmax_of_full_forwards(config, use_cache):
    """From 5 tokens to 33: over the local window (8) and the long-rope switch (20)."""
    model, _ = build(config)
    ids = random_ids(config, 2, 5)
    out = model.generate(
        ids, max_new_tokens=28, do_sample=False, eos_token_id=None, use_cache=use_cache
    )
    assert torch.equal(out, greedy(model, ids, 28))
    assert len(set(out[0].tolist())) > 5  # not one token repeated, which any model could match


@torch.no_grad()
def test_a_step_computes_only_what_the_cache_does_not_hold():
    """But for the one at which long rope switches its factors (20 tokens)."""
    model, _ = build(LONG)
    lengths = []
    model.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    ids = random_ids(LONG, 1, 17)
    model.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert lengths == [17, 1, 1, 1, 21, 1, 1]


@torch.no_grad()
def test_left_padded_batch_generates_what_each_row_does():
    model, _ = build(TINY)
    lengths = [11, 4, 9]
    ids, mask = random_ids(TINY, 3, 11), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 11 - length :] = 1
        ids[row, : 11 - length] = 0
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = greedy(model, ids[row : row + 1, 11 - length :], 15)
        assert torch.equal(out[row, 11 - length :], alone[0])


@torch.no_grad()
def test_beams_and_stop():
    model, _ = build(LONG)
    ids = random_ids(LONG, 2, 17)
    kwargs = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(ids, **kwargs, pad_token_id=0)
    without = model.generate(ids, **kwargs, pad_token_id=0, use_cache=False)
    assert torch.equal(with_cache, without)
    path = greedy(model, ids[:1], 8)[0, 17:]
    stopped = model.generate(
        ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=int(path[3]), pad_token_id=0
    )
    first = path.tolist().index(int(path[3]))
    assert stopped[0, 17:].tolist() == path[: first + 1].tolist()


class Recording(DynamicCache):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def update(self, *, key_states, value_states, layer_idx):
        self.seen[layer_idx] = key_states
        return super().update(key_states, value_states, layer_idx)


@pytest.mark.parametrize("config", [TINY, LONG], ids=["8k", "128k"])
@torch.no_grad()
def test_caches_see_rotated_keys_and_hooks_see_linears(config):
    model, tensors = build(config)
    called = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, o, name=name: called.append(name))
    ids, cache = random_ids(config, 23), Recording()
    assert model(ids[None], past_key_values=cache).past_key_values is cache
    naive = Naive(config, tensors)
    naive(ids.tolist())
    for layer in range(config["num_hidden_layers"]):
        assert relative(cache.seen[layer][0].transpose(0, 1), naive.keys[layer]) < 1e-9
    parts = ("self_attn.query_key_value", "self_attn.dense", "mlp.up_proj", "mlp.down_proj")
    layers = range(config["num_hidden_layers"])
    linears = [f"model.layers.{layer}.{part}" for layer in layers for part in parts]
    assert called == [*linears, "lm_head"]


@torch.no_grad()
def test_forward_options():
    model, _ = build(TINY)
    ids = random_ids(TINY, 2, 9)
    full = model(ids)
    assert relative(model(ids, logits_to_keep=1).logits, full.logits[:, -1:]) < 1e-12
    as_tuple = model(ids, use_cache=False, return_dict=False)
    assert len(as_tuple) == 1
    assert torch.equal(as_tuple[0], full.logits)
    with pytest.raises(TypeError):  # rather than ignoring them
        model(ids, position_ids=torch.arange(9)[None])
