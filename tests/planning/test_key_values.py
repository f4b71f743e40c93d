"""Keys of config.json are judged by their values; absent ones have the source class's default."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers.plan_sources import MODELS
from phireg_plugins.phi3_small.reference_config import Phi3SmallConfig
from transformers.activations import ACT2FN

from phireg import registry
from phireg.config.hf import HFConfig
from phireg.findings import Severity

FAMILIES = {"phi2": "PhiConfig", "phi3-mini": "Phi3Config", "phi3-medium": "Phi3Config"}
SIZES = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 2.5, 3.0],
}  # fmt: skip


def translated(family, config):
    """Target fields; the errors' subjects and details if there are any."""
    result = registry.load(family).family.config_fields().translate(HFConfig(config))
    errors = [f for f in result.findings if f.severity is Severity.ERROR]
    return result.fields, " ".join(f"{e.subject} {e.detail}" for e in errors)


def small(**changes):
    """A Phi-3 of head size 6; changes of None leave a key out."""
    config = MODELS["mini"][1] | {"max_position_embeddings": 256} | changes
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize("family", [*FAMILIES, "phi3-small"])
def test_absent_keys_have_the_defaults_of_the_class(family):
    known = {"phi3-small": Phi3SmallConfig} | {
        name: getattr(transformers, kind) for name, kind in FAMILIES.items()
    }
    default = known[family]()
    fields, errors = translated(family, {"architectures": ["any"]})
    assert not errors
    assert {key: fields[key] for key in SIZES} == {key: getattr(default, key) for key in SIZES}
    assert fields["intermediate_size"] == default.intermediate_size
    assert fields["num_key_value_heads"] == default.num_key_value_heads
    assert fields["tie_word_embeddings"] == default.tie_word_embeddings
    act = {"silu": "swiglu"}.get(default.hidden_act, default.hidden_act)
    assert fields["hidden_act"] == act


@pytest.mark.parametrize(
    ("family", "names", "target"),
    [
        ("phi3-mini", ["silu", "swish"], "swiglu"),
        ("phi2", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh",
                  "gelu_accurate"], "gelu_new"),
    ],
)  # fmt: skip
def test_names_of_one_activation(family, names, target):
    x = torch.linspace(-6, 6, 999)
    for name in names:
        assert translated(family, {"hidden_act": name})[0]["hidden_act"] == target
        if name in ACT2FN:
            torch.testing.assert_close(ACT2FN[name](x), ACT2FN[names[0]](x), atol=1e-5, rtol=1e-5)
    assert "hidden_act" in translated(family, {"hidden_act": "relu"})[1]


@pytest.mark.parametrize("block", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("factor", [4, 4.0, 4.0000000001])
def test_a_stated_factor_that_is_what_the_lengths_say(block, factor):
    rope = {**LONG, "factor": factor}
    if block == "rope_scaling":
        rope["type"] = rope.pop("rope_type")
        rope.pop("rope_theta")
    config = small(original_max_position_embeddings=64, **{block: rope})
    with_factor, errors = translated("phi3-mini", config)
    assert not errors
    rope.pop("factor")
    assert translated("phi3-mini", config)[0] == with_factor


@pytest.mark.parametrize("factor", [32.0, 1, "4", [4], True, {}])
def test_another_factor_is_refused_with_both_numbers(factor):
    rope = {**LONG, "factor": factor}
    config = small(original_max_position_embeddings=64, rope_parameters=rope)
    errors = translated("phi3-mini", config)[1]
    assert "factor" in errors and repr(factor) in errors and " 4" in errors


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 1.0}, {"type": "linear", "factor": 1},
        {"rope_type": "default", "factor": 1.0}, {"rope_type": "default", "attention_factor": 1},
        {"rope_type": "default", "original_max_position_embeddings": 64}, {"rope_type": "default"},
        {},
    ],
    ids=str,
)  # fmt: skip
def test_neutral_values_of_plain_rope(rope):
    fields, errors = translated("phi3-mini", small(rope_scaling=rope))
    assert not errors
    assert fields == translated("phi3-mini", small())[0]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear"},
        {"rope_type": "default", "factor": 2.0}, {"rope_type": "default", "attention_factor": 1.1},
        {"rope_type": "dynamic", "factor": 1.0}, {"rope_type": "linear", "factor": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_other_values_of_plain_rope_are_refused(rope):
    assert "rope_scaling" in translated("phi3-mini", small(rope_scaling=rope))[1]


@pytest.mark.parametrize(
    ("top", "inside"), [(None, 64), (128, 64), (64, None), (64, 64), (None, 4096)]
)
def test_the_original_length_is_the_one_that_transformers_reads(top, inside):
    rope = LONG | ({} if inside is None else {"original_max_position_embeddings": inside})
    config = small(
        original_max_position_embeddings=top, rope_parameters=rope, max_position_embeddings=8192
    )
    theirs = transformers.Phi3Config(**json.loads(json.dumps(config)))
    used = theirs.rope_parameters["original_max_position_embeddings"]
    fields, errors = translated("phi3-mini", config)
    assert fields["original_max_position_embeddings"] == used
    assert bool(errors) == (inside not in (None, used))
    if errors:
        assert all(word in errors for word in (str(inside), str(used), "top level"))
