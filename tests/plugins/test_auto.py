"""Which family a model belongs to: ``--family auto``, and wrong explicit families."""

import pytest
from family_checks import write_sparse
from phi3_models import source_shapes

import phireg
from phireg import registry
from phireg.config.hf import HFConfig
from phireg.errors import SourceError

PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_attention_heads": 32}
SMALL = {"architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small"}


@pytest.mark.parametrize(
    "config, family",
    [
        ({"architectures": ["PhiForCausalLM"], "model_type": "phi"}, "phi2"),
        ({"architectures": ["PhiForCausalLM"], "model_type": "phi-msft"}, "phi2"),
        ({"architectures": ["MixFormerSequentialForCausalLM"]}, "phi2"),
        ({"model_type": "mixformer-sequential"}, "phi2"),
        ({"model_type": "phi"}, "phi2"),
        ({"architectures": ["PhiForCausalLM"]}, "phi2"),
        ({**PHI3, "num_key_value_heads": 32}, "phi3-mini"),
        (PHI3, "phi3-mini"),
        ({**PHI3, "num_key_value_heads": None}, "phi3-mini"),
        ({**PHI3, "num_key_value_heads": 8}, "phi3-medium"),
        ({**PHI3, "num_key_value_heads": 1}, "phi3-medium"),
        (SMALL, "phi3-small"),
        ({**SMALL, "num_attention_heads": 32, "num_key_value_heads": 32}, "phi3-small"),
    ],
)
def test_auto(config, family):
    assert registry.choose(HFConfig(config)).family.name == family


@pytest.mark.parametrize(
    "architecture, model_type, culprit",
    [
        ("LlamaForCausalLM", "llama", "LlamaForCausalLM"),
        ("Phi3ForCausalLM", "phi4mm", "phi4mm"),
        ("Phi3SmallForSequenceClassification", "phi3small", "Phi3SmallForSequenceClassification"),
    ],
)
def test_auto_refuses_with_every_familys_reason(architecture, model_type, culprit):
    with pytest.raises(SourceError) as caught:
        registry.choose(HFConfig({"architectures": [architecture], "model_type": model_type}))
    assert culprit in str(caught.value)
    for family in registry.index():
        assert f"{family}: " in str(caught.value)


PUBLISHED = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 32,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("family", ["phi2", "phi3-small"])
def test_a_wrong_explicit_family_is_refused_with_the_reason(tmp_path, family):
    source = write_sparse(tmp_path / "hf", PUBLISHED, source_shapes(PUBLISHED))
    with pytest.raises(SourceError) as caught:
        phireg.plan(source, family=family)
    assert "Phi3ForCausalLM" in caught.value.message and family in caught.value.message
    assert caught.value.hint
