"""Reading and writing directories in the published layout, and what config.json may say."""

import json

import pytest
import torch
from family_checks import published, without, write_source
from naive_phi3_small import Naive
from phireg_plugins.phi3_small import reference
from safetensors.torch import load_file
from test_phi3_small_math import build, relative
from tiny_phi3_small import (
    LONG,
    LONG_ROPE,
    TINY,
    random_ids,
    random_tensors,
    source_shapes,
)

NOT_READ = ("_name_or_path", "architectures", "attention_bias", "attention_dropout_prob")
NOT_READ += ("auto_map", "blocksparse_triton_kernel_block_size", "embedding_dropout_prob")
NOT_READ += ("ffn_dropout_prob", "pad_sequence_to_multiple_of_64", "reorder_and_upcast_attn")
NOT_READ += ("torch_dtype", "transformers_version")


@pytest.mark.parametrize("config", [TINY, LONG], ids=["8k", "128k"])
@torch.no_grad()
def test_round_trip(tmp_path, config):
    tensors = random_tensors(config)
    source = write_source(tmp_path / "source", config, tensors)
    model, info = reference.Phi3SmallForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = random_ids(config, 30)
    expected = Naive(config, tensors)(ids.tolist())
    assert relative(model.double()(ids[None]).logits[0], expected) < 1e-9

    model.float().save_pretrained(tmp_path / "copy", safe_serialization=True)
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in copied.items()} == source_shapes(config)
    assert all(torch.equal(copied[name], tensors[name]) for name in tensors)
    saved = json.loads((tmp_path / "copy" / "config.json").read_text())
    for key in without(config, "auto_map", "torch_dtype", "tie_word_embeddings"):
        assert saved.get(key, TINY.get(key)) == config[key], key
    again = reference.Phi3SmallForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(again.double()(ids[None]).logits, model.double()(ids[None]).logits)


HEAD = torch.randn(53, 36, generator=torch.Generator().manual_seed(3))
FREQUENCIES = {
    f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(3) for layer in range(3)
}


@pytest.mark.parametrize(
    "config, extra",
    [(TINY, FREQUENCIES), ({**TINY, "tie_word_embeddings": False}, {"lm_head.weight": HEAD})],
    ids=["stored frequencies are ignored", "untied head"],
)
@torch.no_grad()
def test_other_tensors(tmp_path, config, extra):
    tensors = random_tensors(config) | extra
    source = write_source(tmp_path, config, tensors)
    model, info = reference.Phi3SmallForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not any(info.values())
    ids = random_ids(config, 12)
    expected = Naive(config, tensors)(ids.tolist())
    assert relative(model.double()(ids[None]).logits[0], expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(tmp_path, dtype):
    tensors = {name: value.to(dtype) for name, value in random_tensors(LONG).items()}
    name = str(dtype).removeprefix("torch.")
    source = write_source(tmp_path, {**LONG, "torch_dtype": name}, tensors)
    model = reference.Phi3SmallForCausalLM.from_pretrained(source, torch_dtype="auto")
    assert model.dtype == dtype
    ids = random_ids(LONG, 30)
    logits = model(ids[None]).logits[0]
    assert logits.dtype == torch.float32
    wide = {name: value.float() for name, value in tensors.items()}
    error = relative(logits, Naive(LONG, wide)(ids.tolist()), of=lambda e: (e**2).mean() ** 0.5)
    assert error < (0.15 if dtype == torch.bfloat16 else 0.02)


def test_published_defaults():
    """An absent key has the published 8k model's value."""
    stated = without(published("phi-3-small-8k"), *NOT_READ)
    config = reference.Phi3SmallConfig()
    assert {key: getattr(config, key) for key in stated} == stated
    assert (config.head_dim, config.intermediate_size) == (128, 14336)
    assert (config.rope_scaling, config.tie_word_embeddings) == (None, True)


def test_published_size():
    """Parameters of the published model, the tied head counted once."""
    with torch.device("meta"):
        model = reference.Phi3SmallForCausalLM(reference.Phi3SmallConfig())
    sizes = {name: p.numel() for name, p in model.named_parameters() if name != "lm_head.weight"}
    assert sum(sizes.values()) == 7_392_272_384


@pytest.mark.parametrize(
    ("multiplier", "hidden", "pad", "expected"),
    [(4, 4096, True, 11008), (4, 4096, False, 10920), (3, 36, False, 72), (3, 36, True, 256)],
)
def test_intermediate_size_from_the_multiplier(multiplier, hidden, pad, expected):
    config = reference.Phi3SmallConfig(
        hidden_size=hidden,
        num_attention_heads=4,
        ff_dim_multiplier=multiplier,
        ff_intermediate_size=None,
        gegelu_pad_to_256=pad,
    )
    assert config.intermediate_size == expected


PUBLISHED_BASE = {"rope_theta": 1000000.0}
SCALED = {**PUBLISHED_BASE, **LONG_ROPE, "rope_type": "longrope", "partial_rotary_factor": 1.0}


@pytest.mark.parametrize(
    "spelling, scaled",
    [
        ({"rope_scaling": None}, False),
        ({"rope_parameters": {**PUBLISHED_BASE, "rope_type": "default"}}, False),
        ({"rope_scaling": {"type": "default"}}, False),
        ({"rope_scaling": LONG_ROPE}, True),
        ({"rope_scaling": {**LONG_ROPE, "type": "longrope"}}, True),
        ({"rope_embedding_base": 5.0, "rope_parameters": SCALED}, True),
    ],
)
def test_spellings_of_rope(tmp_path, spelling, scaled):
    config = reference.Phi3SmallConfig(**{**TINY, "max_position_embeddings": 96, **spelling})
    config.save_pretrained(tmp_path)
    for read in (config, reference.Phi3SmallConfig.from_pretrained(tmp_path)):
        assert read.rope_embedding_base == 1000000
        rope = read.long_rope()
        if scaled:
            assert rope.short == ([1.1, 1.3, 1.7], 1.2)
            assert rope.long == ([2.0, 5.0, 9.0], 1.4)
            assert rope.original_max_position_embeddings == 20
        else:
            assert read.rope_scaling is None and rope is None


def test_magnitudes_not_given():
    """131072 over 4096 gives the published Phi-3-mini-128k value, 1.1902380714238083."""
    scaling = {**without(LONG_ROPE, "short_mscale"), "long_mscale": -1}
    scaling["original_max_position_embeddings"] = 4096
    long = {**LONG, "max_position_embeddings": 131072, "rope_scaling": scaling}
    rope = reference.Phi3SmallConfig(**long).long_rope()
    assert rope.short[1] == 1.0
    assert rope.long[1] == pytest.approx(1.1902380714238083, rel=1e-15)
    rope = reference.Phi3SmallConfig(**{**long, "max_position_embeddings": 4096}).long_rope()
    assert rope.long[1] == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "silu"},
        {"ff_intermediate_size": None},
        {"ff_dim_multiplier": 4},
        {"rope_scaling": {**LONG_ROPE, "type": "yarn"}},
        {"rope_scaling": {**LONG_ROPE, "attention_factor": 2.0}},
        {"rope_scaling": {**LONG_ROPE, "partial_rotary_factor": 0.5}},
        {"rope_scaling": without(LONG_ROPE, "long_factor")},
        {"rope_scaling": without(LONG_ROPE, "original_max_position_embeddings")},
        {"rope_scaling": {**LONG_ROPE, "short_factor": [1.0]}},
    ],
)
def test_unsupported_configs_are_refused(change):
    with pytest.raises(ValueError):
        reference.Phi3SmallConfig(**{**TINY, **change})


@torch.no_grad()
def test_dummy_tokens():
    published = reference.Phi3SmallConfig().masked_token_indices()
    # Every special id but endoftext, system, user, assistant and end.
    used = {100257, 100261, 100262, 100263, 100266}
    assert published == [i for i in range(100256, 100352) if i not in used]
    assert len(published) == 91
    assert reference.Phi3SmallConfig(dummy_token_indices=[]).masked_token_indices() == []
    assert reference.Phi3SmallConfig(**TINY).masked_token_indices() == []

    ids = random_ids(TINY, 2, 5)
    logits = build({**TINY, "dummy_token_indices": [3, 50]})[0](ids).logits
    expected = build(TINY)[0](ids).logits
    assert (logits[..., [3, 50]] == torch.finfo(torch.float32).min).all()
    others = [i for i in range(53) if i not in (3, 50)]
    assert torch.equal(logits[..., others], expected[..., others])
