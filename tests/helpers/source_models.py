"""Tiny source models of the families, saved as published directories, for loading and calibration.

Awkward on purpose: odd vocabularies, few KV heads, long rope, a tied head, weights in 16 bits.
"""

import json

import torch
import transformers
from phireg_plugins.phi3_small.reference import Phi3SmallConfig, Phi3SmallForCausalLM
from transformers import Phi3Config, Phi3ForCausalLM, PhiConfig, PhiForCausalLM

FOUR = transformers.__version__.startswith("4.")
LONG = {
    "short_factor": [1.1, 1.2, 1.4, 1.7, 2.1, 2.6],
    "long_factor": [2.0, 5.0, 9.5, 3.0, 12.0, 30.0],
}


def randomized(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def rope(**scaling):
    """Keys of config.json as the published models have them, which both majors read."""
    return {"rope_theta": 5000.0, "rope_scaling": scaling or None}


def phi2():
    partial = (
        {"partial_rotary_factor": 0.4}
        if FOUR
        else {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.4
            }
        }
    )  # fmt: skip
    config = PhiConfig(
        vocab_size=101, hidden_size=80, intermediate_size=84, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=False, **partial,
    )  # fmt: skip
    return PhiForCausalLM(config)


def phi3_gqa(**changes):
    """Long rope (past 20 tokens the long factors) and grouped queries."""
    values = {
        "vocab_size": 103, "hidden_size": 96, "intermediate_size": 88, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 640,
        "original_max_position_embeddings": 20, "pad_token_id": 0, "tie_word_embeddings": False,
        **rope(type="longrope", **LONG),
    }  # fmt: skip
    return Phi3ForCausalLM(Phi3Config(**{**values, **changes}))


def phi3_tied():
    return phi3_gqa(tie_word_embeddings=True, num_key_value_heads=8, **rope())


def phi3_small():
    config = Phi3SmallConfig(
        vocab_size=107, hidden_size=96, ff_intermediate_size=88, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=640,
        gegelu_limit=0.5, gegelu_pad_to_256=False, blocksparse_block_size=4,
        blocksparse_num_local_blocks=2, blocksparse_vert_stride=5, dense_attention_every_n_layers=2,
        mup_width_multiplier=3.0, mup_embedding_multiplier=7.0,
        architectures=["Phi3SmallForCausalLM"],
        rope_scaling={
            "type": "longrope", **LONG, "short_mscale": 1.1, "long_mscale": 1.4,
            "original_max_position_embeddings": 20,
        },
    )  # fmt: skip
    return Phi3SmallForCausalLM(config)


MODELS = {
    "phi2": (phi2, "phi2"),
    "phi3-gqa": (phi3_gqa, "phi3-medium"),
    "phi3-tied": (phi3_tied, "phi3-mini"),
    "phi3-small": (phi3_small, "phi3-small"),
}
"""By name: the model's maker and its family."""


def write(name, directory, dtype=torch.float32, shard="5GB"):
    """A source directory in ``dtype``."""
    model = randomized(MODELS[name][0]()).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard, safe_serialization=True)
    return directory


def change(directory, **keys):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
