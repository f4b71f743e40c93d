"""What a reference reads from a directory: what from_pretrained reads, or an older layout."""

import json

import peft
import pytest
import torch
from helpers import tiny_models as sources
from helpers.other_layouts import LAYOUTS, by_head, write_other
from helpers.tiny_models import edit_config, from_pretrained, opened
from safetensors.torch import load_file, save_file

from phireg.errors import SourceError


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def put(tensors, directory, name="model.safetensors"):
    directory.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        torch.save(tensors, directory / name)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)


def check_same(name, directory):
    """The reference holds what transformers loads."""
    reference = opened(name, directory)
    reference.keep_all()
    ours, theirs = reference.model.state_dict(), from_pretrained(name, directory).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    return reference


def sharded(tensors, directory, suffix):
    single = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}[suffix]
    shard = f"shard-1{suffix}"
    put(tensors, directory, shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (directory / f"{single}.index.json").write_text(json.dumps(index))


@pytest.fixture
def several(tmp_path):
    """A directory with four sets of weights; the names in the order in which they are found."""
    directory = sources.write("phi3-gqa", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    shifted = [{key: value + i for key, value in tensors.items()} for i in range(4)]
    put(shifted[0], directory)
    sharded(shifted[1], directory, ".safetensors")
    put(shifted[2], directory, "pytorch_model.bin")
    sharded(shifted[3], directory, ".bin")
    return directory, [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]


def test_the_set_of_weights_that_transformers_loads(several):
    directory, names = several
    for name in names:
        assert check_same("phi3-gqa", directory).parameters.weights.name == name
        (directory / name).unlink()
    with pytest.raises(SourceError):
        opened("phi3-gqa", directory)


def test_a_chosen_set(several):
    directory, names = several
    for shift, name in enumerate(names):
        reference = opened("phi3-gqa", directory, file=name)
        assert reference.parameters.weights.name == name
        reference.keep_all()
        norm = reference.model.state_dict()["model.norm.weight"]
        original = load_file(directory / "model.safetensors")["model.norm.weight"]
        assert torch.equal(norm, original + shift)


def test_an_index_without_any_of_its_shards_is_passed_over(several):
    directory, names = several
    (directory / names[0]).unlink()
    (directory / "shard-1.safetensors").unlink()
    assert opened("phi3-gqa", directory).parameters.weights.name == names[2]
    with pytest.raises(SourceError, match=r"shard-1\.safetensors"):
        opened("phi3-gqa", directory, file=names[1])


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", 7])
def test_an_index_names_files_beside_it(tmp_path, shard):
    directory = sources.write("phi3-gqa", tmp_path)
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError):
        opened("phi3-gqa", directory)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("head", ["absent", "equal", "other", "alone"])
def test_the_head_is_tied_by_value(tmp_path, head, tie):
    directory = sources.write("phi3-gqa", tmp_path)
    edit_config(directory, tie_word_embeddings=tie)
    tensors = load_file(directory / "model.safetensors")
    if head == "absent":
        del tensors["lm_head.weight"]
    elif head == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif head == "alone":
        del tensors["model.embed_tokens.weight"]
    put(tensors, directory)
    if not tie and head in ("absent", "alone"):  # random in transformers
        with pytest.raises(SourceError, match=r"lm_head|embed_tokens"):
            opened("phi3-gqa", directory)
        return
    reference = check_same("phi3-gqa", directory)
    assert reference.parameters.tied == (tie and head != "other")
    assert bool(reference.parameters.notes) == (tie and head == "other")


def test_a_head_that_is_neither_stored_nor_stated(tmp_path):
    directory = edit_config(sources.write("phi3-gqa", tmp_path), tie_word_embeddings="absent")
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    put(tensors, directory)
    reference = opened("phi3-gqa", directory)
    assert reference.parameters.tied and reference.parameters.notes


@pytest.mark.parametrize("tie", [True, False])
def test_a_chosen_tie(tmp_path, tie):
    directory = sources.write("phi3-gqa", tmp_path)
    reference = opened("phi3-gqa", edit_config(directory, tie_word_embeddings=not tie), tie=tie)
    reference.keep_all()
    model = reference.model
    assert (
        torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        == tie
        == reference.parameters.tied
    )


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("phi2", ("layer_norm_eps", "rope_parameters", "num_key_value_heads")),
        ("phi3-tied", ("rms_norm_eps", "rope_parameters", "rope_scaling", "num_key_value_heads")),
    ],
)
@torch.no_grad()
def test_absent_keys_are_the_defaults_of_the_class(tmp_path, name, keys):
    directory = edit_config(sources.write(name, tmp_path), **dict.fromkeys(keys, "absent"))
    edit_config(directory, num_attention_heads=4)  # half of whose dimensions are even
    reference = check_same(name, directory)
    prompt = torch.arange(20)[None]
    expected = from_pretrained(name, directory)(prompt, use_cache=False).logits
    assert torch.equal(reference.model(prompt, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 10**9),
        ("hidden_size", 10**11),
        ("vocab_size", 10**12),
        ("head_dim", 10**10),
    ],
)
def test_sizes_beyond_the_files_are_refused_before_anything_is_built(tmp_path, key, value):
    directory = edit_config(sources.write("phi3-gqa", tmp_path), **{key: value})
    with pytest.raises(SourceError, match=key):
        opened("phi3-gqa", directory)


# --- other layouts: the same logits as the model they were made of ------------------------------


@pytest.mark.parametrize(("name", "change"), LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_other_layouts_compute_the_same(tmp_path, name, change):
    plain, directory = write_other(name, change, tmp_path)
    reference = opened(name, directory)
    reference.keep_all()
    prompt = torch.arange(40)[None]
    expected = from_pretrained(name, plain)(prompt, use_cache=False).logits
    actual = reference.model(prompt, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_cannot_be_put_together_are_named(tmp_path):
    directory = sources.write("phi2", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    tensors, _ = by_head(load_file(directory / "model.safetensors"), config)
    name = "model.layers.1.self_attn.query_key_value.weight"
    put({**tensors, name: tensors[name][:-1]}, directory)
    with pytest.raises(SourceError, match=r"layers\.1\.self_attn\.q_proj"):
        opened("phi2", directory)


# --- adapters: the same values as PEFT --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("phi3-gqa", {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}),
        ("phi3-gqa", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}),
        ("phi3-tied", {"target_modules": ["embed_tokens"], "use_rslora": True}),
        ("phi2", {"target_modules": ["q_proj", "fc2"], "bias": "lora_only"}),
    ],
)
def test_a_merged_adapter(tmp_path, name, settings):
    directory = sources.write(name, tmp_path)
    adapted = peft.get_peft_model(
        from_pretrained(name, directory), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    base = from_pretrained(name, directory)
    adapted.save_pretrained(directory)
    expected = peft.PeftModel.from_pretrained(base, directory).merge_and_unload().state_dict()
    for adapter in ("merge", "ignore"):
        reference = opened(name, directory, adapter=adapter)
        reference.keep_all()
        ours = reference.model.state_dict()
        same = all(torch.allclose(ours[key], expected[key], 1e-5, 1e-6) for key in expected)
        assert same == (adapter == "merge")


def test_an_adapter_of_separate_projections_on_fused_weights(tmp_path):
    """PEFT cannot apply it: the sum is worked out by hand, by rows of query, key and value."""
    directory = sources.write("phi3-gqa", tmp_path)
    adapter, expected = {}, load_file(directory / "model.safetensors")
    for part, rows in (("q", slice(0, 96)), ("v", slice(120, 144))):
        up, down = torch.randn(rows.stop - rows.start, 2), torch.randn(2, 96)
        stem = f"base_model.model.model.layers.1.self_attn.{part}_proj"
        adapter |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        expected["model.layers.1.self_attn.qkv_proj.weight"][rows] += 3 * (up @ down)
    save_file(adapter, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    reference = opened("phi3-gqa", directory, adapter="merge")
    reference.keep_all()
    for key, value in reference.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
