"""What the executor refuses to run, what it keeps in memory, and what it lets one watch."""

import json

import pytest
import torch
from checkpoints_by_hand import random_ids, reference_logits, relative_error, write_checkpoint
from helpers.tiny_models import edit_config, phi2, phi3, phi3_small

from phireg.errors import CheckError, SourceError
from phireg.executor import load, read_spec
from phireg.reader.spec import parse_spec


@pytest.fixture(scope="module")
def small_model():
    return phi3_small(long=32)


@pytest.fixture(scope="module")
def small_config(small_model, tmp_path_factory):
    directory = write_checkpoint(small_model, tmp_path_factory.mktemp("small"))
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"architecture": "LlamaForCausalLM"}, "LlamaForCausalLM"),
        ({"architecture": "absent"}, "architecture"),
        ({"hidden_act": ["swiglu"]}, "swiglu"),
        ({"mapping": [2]}, "mapping"),
        ({"quantization": "FP8"}, "quantization"),
        ({"dtype": "float8"}, "float8"),
        ({"vocab_size": "absent"}, "vocab_size"),
        ({"vocab_size": "107"}, "vocab_size"),
        ({"hidden_size": 97}, "hidden_size"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"rotary_base": "absent"}, "rotary_embedding_base"),
        ({"rotary_pct": 0.3}, "rotary_pct"),
        ({"rotary_scaling": {"type": "linear"}}, "rotary_scaling"),
        ({"position_embedding_type": "learned_absolute"}, "learned_absolute"),
        ({"longrope_short_mscale": "absent"}, "longrope_short_mscale"),
        ({"longrope_scaling_long_factors": [1.0]}, "longrope_scaling_long_factors"),
        ({"longrope_scaling_short_factors": [1.0] * 5 + [0]}, "longrope_scaling_short_factors"),
        ({"original_max_position_embeddings": "absent"}, "original_max_position_embeddings"),
        ({"mup_embedding_multiplier": "absent"}, "mup_embedding_multiplier"),
        ({"blocksparse_homo_head_pattern": 1}, "blocksparse_homo_head_pattern"),
        ({"dense_attention_every_n_layers": 0}, "dense_attention_every_n_layers"),
        ({"mapping": {"tp_size": 2, "world_size": 4}}, "world_size"),
        ({"mapping": {"tp_size": 1, "pp_size": 2}}, "pp_size"),
        ({"mapping": {"tp_size": 3, "world_size": 3}}, "3 ranks"),
        ({"moe": {}}, "moe"),
        ({"qk_layernorm": True}, "qk_layernorm"),
    ],
)  # fmt: skip
def test_configurations_without_a_meaning_are_refused(changes, name, small_config, tmp_path):
    config = {k: v for k, v in (small_config | changes).items() if v != "absent"}
    with pytest.raises(CheckError) as caught:
        parse_spec(config)
    assert name in caught.value.message


def test_no_config_and_no_json(tmp_path):
    for text in (None, "{", "[]"):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(SourceError, match=r"config\.json") as caught:
            load(tmp_path)
        assert caught.value.hint


def test_defaults_of_the_reader(tmp_path):
    edit_config(
        write_checkpoint(phi3(), tmp_path), num_key_value_heads="absent", rotary_base="absent"
    )
    spec = read_spec(tmp_path)
    assert spec.num_kv_heads == 8
    assert spec.rope.base == 10000.0
    # TensorRT-LLM gives phi-2's norms no epsilon; whatever the config says, it is 1e-5.
    edit_config(write_checkpoint(phi2(), tmp_path), norm_epsilon=1e-2, mapping="absent")
    spec = read_spec(tmp_path)
    assert spec.norm_epsilon == 1e-5
    assert spec.tp_size == 1


def test_rank_files_are_counted(tmp_path):
    write_checkpoint(phi2(), tmp_path, 2)
    (tmp_path / "rank1.safetensors").rename(tmp_path / "rank2.safetensors")
    with pytest.raises(CheckError) as caught:
        load(tmp_path)
    assert "rank1.safetensors: no such file" in caught.value.message
    assert "rank2.safetensors: config.json has only 2 rank(s)" in caught.value.message


def test_a_damaged_file_is_no_traceback(tmp_path):
    write_checkpoint(phi2(), tmp_path)
    path = tmp_path / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckError, match=r"rank0\.safetensors"):
        load(tmp_path)


def test_offload_keeps_no_layer_and_changes_nothing(small_model, tmp_path):
    write_checkpoint(small_model, tmp_path, 2)
    ids = random_ids(small_model, 1, 40)
    executor = load(tmp_path, offload=True)
    assert torch.equal(executor(ids), load(tmp_path, offload=False)(ids))
    assert executor.layer_weights(0) is not executor.layer_weights(0)


def test_weights_that_do_not_fit_are_read_layer_by_layer(tmp_path, monkeypatch):
    write_checkpoint(phi2(), tmp_path, dtype=torch.float16)
    monkeypatch.setattr("phireg.executor.model.free_memory", lambda: 100_000)
    assert load(tmp_path, dtype="float32").offload
    assert not load(tmp_path).offload  # same dtype: used where it is mapped


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.012)])
def test_half_precision_stays_near_float32(dtype, bound, tmp_path):
    model = phi3(num_key_value_heads=4)
    write_checkpoint(model, tmp_path, 2, dtype=dtype)
    for parameter in model.parameters():  # the same rounded weights
        parameter.data = parameter.data.to(dtype).float()
    ids = random_ids(model, 1, 12)
    expected = reference_logits(model, ids)
    assert relative_error(load(tmp_path, dtype="float32")(ids), expected) < 1e-4
    assert 1e-4 < relative_error(load(tmp_path)(ids), expected) < bound


def test_sub_modules_can_be_watched(tmp_path):
    """Against the values transformers' own modules give."""
    model = phi2()
    executor = load(write_checkpoint(model, tmp_path, 2))
    ids = random_ids(model, 2, 9)
    expected, actual = {}, {}

    def keep(key):
        def hook(_module, _inputs, output):
            expected[key] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [model.model.embed_tokens.register_forward_hook(keep((-1, "embedding")))]
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(keep((i, "hidden"))))
        hooks.append(layer.self_attn.register_forward_hook(keep((i, "attention"))))
        hooks.append(layer.mlp.register_forward_hook(keep((i, "mlp"))))
    reference_logits(model, ids)
    for hook in hooks:
        hook.remove()
    executor(ids, observe=lambda layer, what, value: actual.update({(layer, what): value}))
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert relative_error(value, expected[key]) < 1e-4, key
