"""Phi-3.5-MoE in FP8: what calibration sees of experts, and their scales and values."""

import pytest
import torch
from phireg_plugins.phi35_moe import FAMILY
from safetensors.torch import load_file, save_file
from test_phi35_verified import SIZES

from phireg.calibration.collect import collect
from phireg.reference.load import open_reference
from phireg.testing import write_tiny_model

EXPERTS, IDLE = SIZES["num_local_experts"], 4
MOE = "model.layers.{}.block_sparse_moe"
ROWS = [[5, 9, 13, 40, 2, 77, 21], [3, 3, 8], [60, 61, 62, 63, 64, 65]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose last layer never chooses one of the experts."""
    directory = tmp_path_factory.mktemp("source")
    write_tiny_model(FAMILY, SIZES, directory)
    tensors = load_file(directory / "model.safetensors")
    layer = MOE.format(SIZES["num_hidden_layers"] - 1)
    tensors[f"{layer}.gate.weight"][IDLE] = 0
    tensors["model.layers.1.post_attention_layernorm.bias"].fill_(1)  # tokens point one way,
    for expert in {0, 1, 2}:  # and three routers the same
        tensors[f"{layer}.gate.weight"][expert] += 1
    save_file(tensors, directory / "model.safetensors")
    return directory


def opened(directory):
    return open_reference(
        FAMILY, directory, weights=None, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.fixture(scope="module")
def statistics(source):
    return collect(opened(source), ROWS, device=torch.device("cpu"))


def test_maxima_of_each_experts_own_tokens(source, statistics):
    """Worked out token by token from the scores; an expert without tokens has zeros."""
    reference = opened(source)
    reference.keep_all()
    model, tensors = reference.model, load_file(source / "model.safetensors")
    expected = {}

    def look(index):
        name = MOE.format(index)

        def hook(_, arguments):
            for token in arguments[0].reshape(-1, SIZES["hidden_size"]):
                scores = tensors[f"{name}.gate.weight"] @ token
                for expert in scores.topk(2).indices.tolist():
                    w1, w3 = (tensors[f"{name}.experts.{expert}.{w}.weight"] for w in ("w1", "w3"))
                    inner = torch.nn.functional.silu(w1 @ token) * (w3 @ token)
                    for w, value in (("w1", token), ("w3", token), ("w2", inner)):
                        key = f"{name}.experts.{expert}.{w}"
                        before = expected.get(key, torch.zeros_like(value))
                        expected[key] = torch.maximum(before, value.abs())

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.block_sparse_moe.register_forward_pre_hook(look(index))
    for row in ROWS:
        reference.logits(torch.tensor([row]))
    names = {name for name in statistics.inputs if ".experts." in name}
    assert len(names) == 2 * EXPERTS * 3 and expected.keys() < names
    for name in names:
        if name in expected:
            assert torch.allclose(torch.tensor(statistics.inputs[name]), expected[name], rtol=1e-4)
        else:
            assert not statistics.inputs[name].any()
    idle = {f"{MOE.format(1)}.experts.{IDLE}.{w}" for w in ("w1", "w2", "w3")}
    assert idle <= names - expected.keys()
