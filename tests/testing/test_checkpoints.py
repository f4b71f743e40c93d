"""Source checkpoints made for tests: tiny ones whose values hide no mistake, and cut ones."""

import json

import pytest
import torch
from phireg_plugins.phi3_mini import FAMILY as MINI
from safetensors.torch import load_file, save_file
from testing.acme import BASES, TINY

from phireg.errors import OutputError, PluginError, SourceError, UsageError
from phireg.testing import cut, write_tiny_model

# --- tiny models -----------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_values_hide_nothing(base, tmp_path):
    tensors = load_file(write_tiny_model(BASES[base], TINY[base], tmp_path) / "model.safetensors")
    for name, tensor in tensors.items():
        values = tensor.double()
        assert torch.isfinite(values).all()
        assert len(values.unique(dim=0)) == len(values), name
        if "norm" in name and name.endswith("weight"):
            assert 0.7 < values.mean() < 1.3 and 0.15 < values.std() < 0.5, name
        elif name.endswith("bias"):
            assert 0.15 < values.std() < 0.5, name


def test_the_config_is_the_callers(tmp_path):
    write_tiny_model(MINI, TINY["mini"], tmp_path)
    named = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "torch_dtype": "float32"}
    assert json.loads((tmp_path / "config.json").read_text()) == {**named, **TINY["mini"]}


def test_seed_and_dtype(tmp_path):
    def norm(name, **options):
        directory = write_tiny_model(MINI, TINY["mini"], tmp_path / name, **options)
        return load_file(directory / "model.safetensors")["model.norm.weight"]

    first = norm("first")
    assert torch.equal(first, norm("same"))
    assert not torch.equal(first, norm("other", seed=1))
    assert torch.equal(first.bfloat16(), norm("bfloat16", dtype="bfloat16"))


def test_a_config_that_no_model_class_reads(tmp_path):
    with pytest.raises(PluginError) as caught:
        write_tiny_model(MINI, {**TINY["mini"], "num_attention_heads": "many"}, tmp_path)
    assert "num_attention_heads" in caught.value.message


# --- cutting ---------------------------------------------------------------------------------

LAYERS = 3


def tensors_of(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = write_tiny_model(MINI, TINY["mini"], tmp_path_factory.mktemp("whole"))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling_phi3.py").write_text("raise SystemExit")
    return directory


def sharded(whole, directory, layer_of):
    """The same model in a shard per layer and one for the rest."""
    shards = {}
    for name, tensor in tensors_of(whole).items():
        shards.setdefault(layer_of(name), {})[name] = tensor
    directory.mkdir()
    weight_map = {}
    for number, key in enumerate(sorted(shards, key=str), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shards[key], directory / file)
        weight_map |= dict.fromkeys(shards[key], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_bytes((whole / "config.json").read_bytes())
    return directory


def kept(tensors, layers):
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not any(f"layers.{n}." in name for n in range(layers, LAYERS))
    }


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_one_file(whole, tmp_path, layers):
    directory = cut(whole, tmp_path / "cut", layers=layers)
    assert {p.name for p in directory.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"
    }  # fmt: skip
    assert_equal(tensors_of(directory), kept(tensors_of(whole), layers))
    config = json.loads((whole / "config.json").read_text())
    shortened = json.loads((directory / "config.json").read_text())
    assert shortened == {**config, "num_hidden_layers": layers}


def test_shards_stay_shards_and_are_numbered_anew(whole, tmp_path):
    many = sharded(whole, tmp_path / "many", lambda n: n.split(".")[2] if "layers" in n else "x")
    directory = cut(many, tmp_path / "cut", layers=1)
    names = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert {p.name for p in directory.glob("*.safetensors")} == names
    expected = kept(tensors_of(whole), 1)
    assert_equal(tensors_of(directory), expected)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(directory / file)
    assert index["weight_map"].keys() == expected.keys()


def test_a_cut_model_converts_and_runs_as_the_reference_does(whole, tmp_path):
    import phireg

    directory = cut(whole, tmp_path / "cut", layers=2)
    phireg.convert(phireg.plan(directory, family="phi3-mini", dtype="float32"), tmp_path / "out")
    verification = phireg.verify(tmp_path / "out", directory, family="phi3-mini")
    assert verification.passed and verification.check("logits").verdict == "passed"


def edited(whole, directory, rename=lambda name: name, **config):
    directory.mkdir()
    save_file(
        {rename(name): t for name, t in tensors_of(whole).items()}, directory / "model.safetensors"
    )
    values = {**json.loads((whole / "config.json").read_text()), **config}
    values = {key: value for key, value in values.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def test_lists_with_an_entry_per_layer_are_cut(whole, tmp_path):
    model = edited(whole, tmp_path / "model", layer_types=["full", "sliding", "full"])
    directory = cut(model, tmp_path / "cut", layers=2)
    assert json.loads((directory / "config.json").read_text())["layer_types"] == ["full", "sliding"]


@pytest.mark.parametrize(
    "rename, config",
    [
        (lambda n: n, {"attention_windows": [1, 2, 3]}),
        (lambda n: n, {"num_hidden_layers": None}),
        (lambda n: n, {"n_layer": 4}),
        (lambda n: n, {"num_hidden_layers": 4}),
        (lambda n: n.replace("layers.2.", "layers.7."), {}),
        (lambda n: n.replace("layers.", "stages."), {}),
        (lambda n: n.replace(".mlp.", ".layers.0.mlp."), {}),
    ],
)
def test_layers_that_cannot_be_told_are_refused(whole, tmp_path, rename, config):
    model = edited(whole, tmp_path / "model", rename, **config)
    with pytest.raises(SourceError):
        cut(model, tmp_path / "cut", layers=1)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_that_do_not_exist(whole, tmp_path, layers):
    with pytest.raises(UsageError):
        cut(whole, tmp_path / "cut", layers=layers)


def test_an_output_that_exists_is_kept(whole, tmp_path):
    with pytest.raises(OutputError):
        cut(whole, whole, layers=1)
    assert len(tensors_of(whole)) == 3 + 6 * LAYERS
