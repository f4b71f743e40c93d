"""Logits of the executor against the source models' own code."""

import pytest
import torch
from checkpoints_by_hand import random_ids, reference_logits, relative_error, write_checkpoint
from helpers.tiny_models import phi2, phi3, phi3_small

from phireg.executor import blocks, load

MODELS = {
    "phi2": (phi2, {}),
    "phi2-partial": (phi2, {"hidden_size": 160, "partial_rotary_factor": 0.5}),
    "phi3": (phi3, {}),
    "phi3-gqa": (phi3, {"num_key_value_heads": 2}),
    "phi3-long": (phi3, {"long": 32}),
    "phi3-long-gqa": (phi3, {"long": 32, "num_key_value_heads": 4}),
    "small": (phi3_small, {}),
    "small-every-3": (phi3_small, {"dense_attention_every_n_layers": 3, "num_hidden_layers": 4}),
    "small-homo": (phi3_small, {"blocksparse_homo_head_pattern": True}),
    # more stripes than heads: the step from head to head is 2
    "small-step": (phi3_small, {"blocksparse_vert_stride": 17, "num_key_value_heads": 2}),
    "small-no-limit": (phi3_small, {"gegelu_limit": None}),
    "small-long": (phi3_small, {"long": 32}
    ),
}  # fmt: skip
_BUILT = {}


def built(name):
    if name not in _BUILT:
        make, changes = MODELS[name]
        _BUILT[name] = make(**changes)
    return _BUILT[name]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_source_models(name, ranks, tmp_path):
    model = built(name)
    executor = load(write_checkpoint(model, tmp_path, ranks))
    for length in (5, 150, *((31, 32, 33) if "long" in name else ())):  # long rope: from 33 on
        ids = random_ids(model, 2, length)
        expected = reference_logits(model, ids)
        actual = executor(ids)
        assert actual.dtype == torch.float32
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 20])
def test_keys_that_are_no_numbers_are_not_lost(tokens, dtype):
    """PyTorch's attention drops them where there are few."""
    query, key, value = torch.randn(3, 1, 2, tokens, 8).to(dtype)
    key[0, 0] = torch.nan
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = query.double() @ key.double().mT / 2
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.double()

    def mask(first, last, keys):
        return seen[first:last, :keys]

    for y in (
        blocks.causal_attention(query, key, value, 0.5),
        blocks.masked_attention(query, key, value, 0.5, mask),
    ):
        assert torch.equal(y.isnan(), expected.isnan())
        error = relative_error(y[0, 1].double(), expected[0, 1])
        assert error < (1e-6 if dtype == torch.float32 else 1e-2)
