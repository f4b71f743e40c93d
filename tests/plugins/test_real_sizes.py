"""The published sizes, planned from headers: parameters counted by hand, files of holes."""

import json

import pytest
from phireg_plugins.phi4 import FAMILY as PHI4
from phireg_plugins.phi4_mini import FAMILY as PHI4_MINI
from phireg_plugins.phi35_mini import FAMILY as PHI35_MINI
from phireg_plugins.phi35_moe import FAMILY as PHI35_MOE
from unregistered import planned

from phireg.files.safetensors import encode_header
from phireg.testing.sources import source_shapes

LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
MOE_LONG = {
    "type": "longrope",
    "short_factor": [1.0] * 64,
    "long_factor": [2.0] * 64,
    "short_mscale": 1.243163121016122,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": 4096,
}


def dense(layers, hidden, inner, q, kv, vocab, tied=False):
    """Parameters of Phi-3's architecture: no biases, two norms per layer and one at the end."""
    layer = (q + 2 * kv) * hidden + hidden * q + 3 * inner * hidden + 2 * hidden
    return layers * layer + (1 if tied else 2) * vocab * hidden + hidden


def mixture(layers, hidden, inner, q, kv, vocab, experts):
    attention = (q + 2 * kv) * (hidden + 1) + hidden * (q + 1)
    layer = attention + experts * (3 * inner * hidden + hidden) + 4 * hidden
    return layers * layer + 2 * vocab * hidden + vocab + 2 * hidden


CASES = {
    "phi4": (PHI4, {}, dense(40, 5120, 17920, 5120, 1280, 100352)),
    "phi4-mini": (
        PHI4_MINI,
        {"rope_scaling": LONG, "original_max_position_embeddings": 4096},
        dense(32, 3072, 8192, 3072, 1024, 200064, tied=True),
    ),
    "phi3.5-mini": (
        PHI35_MINI,
        {"rope_scaling": LONG, "original_max_position_embeddings": 4096},
        dense(32, 3072, 8192, 3072, 3072, 32064),
    ),
    "phi3.5-moe": (
        PHI35_MOE,
        {"rope_scaling": MOE_LONG},
        mixture(32, 4096, 6400, 4096, 1024, 32064, 16),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_read_once(name, tmp_path):
    family, rope, parameters = CASES[name]
    config = {**family.published[0].config, **rope}
    shapes = source_shapes(family, config)
    header, entries = encode_header([(name, "BF16", shape) for name, shape in shapes.items()])
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.nbytes for entry in entries.values()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = planned(family, tmp_path, tp_size=2)
    assert plan.errors == ()
    assert plan.bytes_in == 2 * parameters
    assert plan.options.dtype == "bfloat16"


def test_the_published_count_of_the_mixture():
    """42 billion parameters, 41.9 exactly."""
    assert CASES["phi3.5-moe"][2] == 41_873_153_344
