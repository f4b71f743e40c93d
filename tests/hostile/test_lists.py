"""Many thousands of anything take seconds, and what is printed of them is bounded."""

import json

import numpy as np
import pytest
from helpers.tiny_phi3 import INDEX, write_json
from safetensors.numpy import load_file, save_file

pytestmark = [pytest.mark.hostile("lists and names"), pytest.mark.slow]

MANY = 10_000  # a quadratic step takes minutes
SECONDS = 60  # many times what it takes
PLAN = "plan --model-dir {}/model"


def listed(place):
    return json.loads((place / "model" / INDEX).read_text())["weight_map"]


def unknown_tensors(place, name="x{}", count=MANY):
    tensors = {name.format(number): np.zeros(1, "f2") for number in range(count)}
    save_file(tensors, place / "model/more.safetensors")
    write_json(
        place / "model" / INDEX,
        {"weight_map": listed(place) | dict.fromkeys(tensors, "more.safetensors")},
    )


def layers_of_tensors(place):
    unknown_tensors(place, "model.layers.{}.x")


def long_names(place):
    unknown_tensors(place, "y" * 900 + "{}", 3000)


def missing_shards(place):
    more = {f"x{number}": f"s{number}.safetensors" for number in range(MANY)}
    write_json(place / "model" / INDEX, {"weight_map": listed(place) | more})


def many_shards(place):
    more = {f"x{number}": f"s{number}.safetensors" for number in range(3000)}
    for name, file in more.items():
        save_file({name: np.zeros(1, "f2")}, place / "model" / file)
    write_json(place / "model" / INDEX, {"weight_map": listed(place) | more})


def other_names(place):
    held = {f"x{number}": np.zeros(1, "f2") for number in range(MANY)}
    save_file(held, place / "model/a.safetensors")
    names = {f"y{number}": "a.safetensors" for number in range(MANY)}
    write_json(place / "model" / INDEX, {"weight_map": names})


def rank_tensors(place, name="x{}"):
    path = place / "ckpt/rank0.safetensors"
    more = {name.format(number): np.zeros(1, "f4") for number in range(MANY)}
    save_file(load_file(path) | more, path)


def rank_scales(place):
    rank_tensors(place, "transformer.layers.{}.attention.kv_cache_scaling_factor")


def changed(file, **values):
    def apply(place):
        document = json.loads((place / file).read_text())
        write_json(place / file, document | values)

    return apply


KEYS = {f"k{number}": number for number in range(MANY)}
PATTERNS = {"quant_algo": "FP8", "exclude_modules": [f"x{number}*[a]" for number in range(MANY)]}
NAMES = {"quant_algo": "FP8", "exclude_modules": [f"x{number}" for number in range(MANY)]}
FILES = {f"f{number}": {"size": 1, "digest": ""} for number in range(MANY)}
INSPECT, VERIFY = "inspect {}/ckpt", "verify {}/ckpt --model-dir {}/model --quick"
RUN = "run {}/ckpt --prompt a --max-new-tokens 1 --device cpu"

CASES = [
    (lambda place: unknown_tensors(place, count=100_000), PLAN),
    (unknown_tensors, "convert --model-dir {}/model --output-dir {}/out"),
    (layers_of_tensors, PLAN),
    (long_names, PLAN),
    (missing_shards, PLAN),
    (many_shards, PLAN),
    (other_names, PLAN),
    (rank_tensors, INSPECT),
    (rank_tensors, RUN),
    (rank_scales, VERIFY),
    (changed("model/config.json", **KEYS), PLAN),
    (changed("model/config.json", rope_scaling=KEYS), PLAN),
    (changed("model/config.json", architectures=["A" * 100] * MANY), PLAN),
    (changed("model/config.json", model_type="x" * 10**6), PLAN),
    (changed("model/config.json", head_dim="x" * 10**6), PLAN),
    (changed("ckpt/config.json", **KEYS), VERIFY),
    (changed("ckpt/config.json", architecture="x" * 10**6), INSPECT),
    (changed("ckpt/config.json", mapping=KEYS), RUN),
    (changed("ckpt/config.json", mapping={"world_size": 1000}), INSPECT),
    (changed("ckpt/config.json", quantization=PATTERNS), INSPECT),
    (changed("ckpt/config.json", quantization=NAMES), VERIFY),
    (changed("ckpt/phireg.json", files=FILES), "inspect --check {}/ckpt"),
]


@pytest.mark.parametrize(("make", "words"), CASES)
def test_many(make, words, place, within):
    make(place)
    within(*words.format(place, place).split(), seconds=SECONDS, most=2**16)


@pytest.mark.parametrize(("make", "words"), [CASES[2], CASES[9], CASES[15], CASES[21]])
def test_many_in_json(make, words, place, within):
    make(place)
    # Of a list there are up to 5000 items.
    within(*words.format(place, place).split(), "--json", seconds=SECONDS, most=2**22)
