"""phireg's own wheel, built once, and a tiny model."""

import pytest
from helpers.fresh_environment import build_wheel, copy_of_the_checkout

TINY = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 40, "vocab_size": 97, "max_position_embeddings": 64,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def phireg_wheel(tmp_path_factory):
    checkout = tmp_path_factory.mktemp("checkout")
    return build_wheel(copy_of_the_checkout(checkout), tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory):
    from phireg_plugins.phi3_mini import FAMILY

    from phireg.testing import write_random_model

    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_random_model(FAMILY, TINY, directory)
    return directory
