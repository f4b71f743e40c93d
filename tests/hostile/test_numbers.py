"""Numbers have ranges before they are used: nothing runs for as long as a number says."""

import json

import pytest
from helpers.command_line import run_phireg
from helpers.tiny_phi3 import write_json

pytestmark = pytest.mark.hostile("numbers")

HUGE = {"billion": 10**9, "beyond-a-double": 10**400, "float": 1e30, "minus": -1, "zero": 0}
SIZES = [
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "intermediate_size", "max_position_embeddings"),
]


def change(path, value, *keys):
    document = json.loads(path.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = value
    write_json(path, document)


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("key", SIZES)
def test_of_a_source(key, value, place, refused):
    change(place / "model/config.json", value, key)
    refused("plan", "--model-dir", place / "model", codes=(3,), named="config")


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("key", [*SIZES[:-1], "tp_size", "world_size", "moe_ep_size"])
def test_of_a_checkpoint(key, value, place, refused):
    keys = (key,) if key in SIZES else ("mapping", key)
    change(place / "ckpt/config.json", value, *keys)
    refused("inspect", place / "ckpt", named="config.json")
    refused("run", place / "ckpt", "--prompt", "a", "--device", "cpu", named="config.json")


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize(
    "keys",
    [
        ("build_config", "max_batch_size"),
        ("build_config", "max_input_len"),
        ("build_config", "max_seq_len"),
        ("build_config", "max_beam_width"),
        ("pretrained_config", "vocab_size"),
        ("pretrained_config", "mapping", "world_size"),
    ],
    ids=lambda keys: keys[-1],
)
def test_of_an_engine(keys, value, place, refused):
    change(place / "engine/config.json", value, *keys)
    refused("run", place / "engine", "--prompt", "a", named="config.json")


OPTIONS = [
    ("plan --model-dir {}/model", ["--tp-size", "--pp-size", "--moe-tp-size", "--moe-ep-size"]),
    ("run {}/ckpt --prompt a --device cpu", ["--max-new-tokens", "--batch-size", "--top-k"]),
    ("summarize {}/ckpt --device cpu --dataset demo", ["--batch-size", "--max-input-length"]),
    ("verify {}/ckpt --model-dir {}/model --device cpu", ["--max-tokens"]),
]


@pytest.mark.parametrize("value", ["1000000", "1" + "0" * 30, "9" * 5000, "-1", "1e30"])
@pytest.mark.parametrize(
    ("words", "option"), [(words, option) for words, options in OPTIONS for option in options]
)
def test_of_options(words, option, value, place, refused):
    if value == "1000000" and option not in OPTIONS[0][1]:
        pytest.skip("a possible number")
    refused(*words.format(place, place).split(), option, value, codes=(2,))


@pytest.mark.parametrize("version", ["9" * 5000, "1." + "0" * 5000, "1.2.3+" + "x" * 5000])
def test_versions(version, place, refused):
    words = f"build {place}/ckpt --output-dir {place}/out --print-command --trtllm-version".split()
    if "x" not in version and "1." not in version:
        refused(*words, version, codes=(2,))
    else:
        assert run_phireg(*words, version).exit_code in (0, 2, 7)
