"""The example of a third party's package, installed from its wheel beside phireg's."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.fresh_environment import FreshEnvironment, build_wheel
from safetensors.torch import load_file, save_file

from phireg.testing import write_random_model

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "phireg-megatron"
GROUPS, SHARE, SIZE = 2, 3, 8
SIZES = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
    "hidden_size": GROUPS * SHARE * SIZE, "num_hidden_layers": 2, "intermediate_size": 40,
    "num_attention_heads": GROUPS * SHARE, "num_key_value_heads": GROUPS, "vocab_size": 97,
    "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "float32", "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def environment(phireg_wheel, tmp_path_factory):
    environment = FreshEnvironment(tmp_path_factory.mktemp("environment"))
    copy = tmp_path_factory.mktemp("example") / EXAMPLE.name  # a build writes where it builds
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    environment.install(phireg_wheel, build_wheel(copy, tmp_path_factory.mktemp("wheels")))
    return environment


def test_it_is_listed_and_its_own_tests_pass(environment):
    document = json.loads(environment.check("phireg", "families", "--check", "--json"))
    (family,) = (f for f in document["families"] if f["name"] == "phi4-megatron")
    assert (family["distribution"], family["problem"]) == ("phireg-megatron", None)
    options = ("-q", "-p", "no:cacheprovider", EXAMPLE / "tests")
    output = environment.check("python", "-m", "pytest", *options)
    assert " passed" in output or "[100%]" in output


def test_reordered_rows_give_the_same_checkpoint(environment, tmp_path):
    """A Phi-4, and the same one with the rows of qkv put into groups by hand."""
    from phireg_plugins.phi4 import FAMILY

    plain, grouped = tmp_path / "plain", tmp_path / "grouped"
    write_random_model(FAMILY, SIZES, plain)
    tensors = load_file(plain / "model.safetensors")
    for name in (name for name in tensors if "qkv" in name):
        heads = tensors[name].unflatten(0, (-1, SIZE))
        queries, keys = GROUPS * SHARE, GROUPS * SHARE + GROUPS
        order = [
            head
            for g in range(GROUPS)
            for head in (*range(g * SHARE, (g + 1) * SHARE), queries + g, keys + g)
        ]
        assert order == [0, 1, 2, 6, 8, 3, 4, 5, 7, 9]
        tensors[name] = heads[order].flatten(0, 1).contiguous()
    grouped.mkdir()
    save_file(tensors, grouped / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["architectures"] = ["MegatronPhi3ForCausalLM"]
    (grouped / "config.json").write_text(json.dumps(config))
    for source, family in ((plain, "phi4"), (grouped, "phi4-megatron")):
        options = ("--output-dir", tmp_path / family, "--tp-size", 2, "--dtype", "float32")
        how = () if source is grouped else ("--family", family)
        environment.check("phireg", "convert", "--model-dir", source, *options, *how)
    for name in ("rank0.safetensors", "rank1.safetensors", "config.json"):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("phi4", "phi4-megatron"))
        assert first == second
    options = ("verify", tmp_path / "phi4-megatron", "--model-dir", grouped, "--json")
    checks = json.loads(environment.check("phireg", *options))["checks"]
    assert {check["verdict"] for check in checks} == {"passed"}
