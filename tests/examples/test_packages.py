"""The example packages, installed from wheels beside phireg's in a fresh environment."""

import json
import shutil

import pytest
from example_models import EXAMPLES, randomize
from helpers.fresh_environment import FreshEnvironment, build_wheel, copy_of_the_checkout
from helpers.tokenized_models import chat_tokenizer

pytestmark = pytest.mark.slow

PACKAGES = {"phireg-phi4": ("phi4", "phi4-mini"), "phireg-phi35": ("phi35-mini", "phi35-moe")}
SMALL = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 40, "vocab_size": 317, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"rope_type": "longrope", "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Of phireg and of the packages; a build writes into the directory it builds."""
    place, copies = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("sources")
    built = [build_wheel(copy_of_the_checkout(tmp_path_factory.mktemp("checkout")), place)]
    for name in PACKAGES:
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
        shutil.copytree(EXAMPLES / name, copies / name, ignore=unwanted)
        built.append(build_wheel(copies / name, place))
    return built


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory):
    environment = FreshEnvironment(tmp_path_factory.mktemp("environment"))
    environment.install(*wheels)
    return environment


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each family, as transformers saves it."""
    from transformers import Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

    factors = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [2.0] * 3}
    rope = {**ROPE, **factors, "rope_theta": 10000.0}
    phi3 = {**SMALL, "tie_word_embeddings": False}
    long = {**phi3, "rope_parameters": rope, "original_max_position_embeddings": 32}
    plain = {"rope_type": "default", "rope_theta": 250000.0}
    mini = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    mini["rope_parameters"] = {**rope, "partial_rotary_factor": 0.75}
    moe = {"num_local_experts": 4, "router_jitter_noise": 0.2}
    moe |= {"attention_bias": True, "lm_head_bias": True}
    moe["rope_parameters"] = {**rope, "short_mscale": 1.1, "long_mscale": 1.3}
    configs = {
        "phi4": Phi3Config(**phi3, rope_parameters=plain),
        "phi4-mini": Phi3Config(**{**long, **mini}),
        "phi35-mini": Phi3Config(**{**long, "num_key_value_heads": 8}),
        "phi35-moe": PhimoeConfig(**{**long, **moe}),
    }
    tokenizer = chat_tokenizer()
    places = {}
    for family, config in configs.items():
        places[family] = tmp_path_factory.mktemp(family)
        kind = PhimoeForCausalLM if family == "phi35-moe" else Phi3ForCausalLM
        randomize(kind(config)).save_pretrained(places[family])
        tokenizer.save_pretrained(places[family])
    return places


def test_they_are_listed(environment):
    document = json.loads(environment.check("phireg", "families", "--check", "--json"))
    plugins = {plugin["name"]: plugin for plugin in document["families"]}
    for package, families in PACKAGES.items():
        for family in families:
            plugin = plugins[family]
            assert (plugin["distribution"], plugin["api"]) == (package, 1)
            assert plugin["problem"] is None
    document = json.loads(environment.check("phireg", "families", "--json"))
    published = {
        model["repo_id"]: model["tp_sizes"]
        for family in document["families"]
        for model in family["published"]
    }
    assert published["microsoft/phi-4"] == [1, 2, 5, 10, 20, 40]
    assert published["microsoft/Phi-3.5-MoE-instruct"] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("package", PACKAGES)
def test_their_own_tests_pass(package, environment):
    tests = EXAMPLES / package / "tests"
    output = environment.check("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert " passed" in output or "[100%]" in output


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("phi4", ()),
        ("phi4-mini", ("--tp-size", "2")),
        ("phi35-mini", ("--family", "phi35-mini", "--tp-size", "2")),
        ("phi35-moe", ()),
        ("phi35-moe", ("--tp-size", "4", "--moe-tp-size", "2")),
    ],
)
def test_convert_verify_run(family, options, environment, models, tmp_path):
    """Without --family auto finds it; only Phi-3.5-mini cannot be told from Phi-3-mini."""
    source, output = models[family], tmp_path / "ckpt"
    converted = environment.check(
        *("phireg", "convert", "--json", "--model-dir", source, "--output-dir", output),
        *("--dtype", "float32", *options),
    )
    assert json.loads(converted)["family"] == family
    checked = json.loads(
        environment.check(
            *("phireg", "verify", "--json", output, "--model-dir", source),
            *(("--family", family) if family == "phi35-mini" else ()),
        )
    )
    verdicts = {check["name"]: check["verdict"] for check in checked["checks"]}
    assert verdicts.pop("ranks") == ("passed" if "--tp-size" in options else "not needed")
    assert set(verdicts.values()) == {"passed"}, checked
    prompt = ("--prompt", "The engine reads", "--max-new-tokens", "5", "--json")
    texts = []
    for place in ((output,), ("--backend", "hf", source, "--dtype", "float32")):
        answers = json.loads(environment.check("phireg", "run", *place, "--device", "cpu", *prompt))
        texts.append(answers["results"][0]["tokens"])
    assert len(texts[0]) == 5 and texts[0] == texts[1]
