"""Tiny source models of the families, and their directories; shaped so that mistakes show.

Queries and keys are large, biases and norms random, epsilons raised, vocabularies odd, and long
rope switches early. ``changes`` are keys of the configs.
"""

import json
from functools import partial

import torch
import transformers
from phireg_plugins.phi3_small.reference import Phi3SmallConfig, Phi3SmallForCausalLM
from transformers import (
    AutoModelForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from phireg import registry
from phireg.reference.load import open_reference

FOUR = transformers.__version__.startswith("4.")
FACTORS = {
    "short_factor": [1.1, 1.2, 1.4, 1.7, 2.1, 2.6],
    "long_factor": [2.0, 5.0, 9.5, 3.0, 12.0, 30.0],
}


def randomize(model, boost, seed=0, bias=0.2):
    """Weights, biases and norms at random, queries and keys ``boost`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(bias * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "query_key_value")):
                parameter.mul_(boost)
    return model.eval()


def rope(kind="default", partial_rotary_factor=1.0, **scaling):
    """Keys of a config, as the major version of transformers reads them."""
    if FOUR:
        scaling = {"type": kind, **scaling} if scaling else None
        return {
            "rope_theta": 5000.0, "partial_rotary_factor": partial_rotary_factor,
            "rope_scaling": scaling,
        }  # fmt: skip
    return {
        "rope_parameters": {
            "rope_type": kind, "rope_theta": 5000.0,
            "partial_rotary_factor": partial_rotary_factor, **scaling,
        }
    }  # fmt: skip


def phi2(partial_rotary_factor=0.4, **changes):
    config = {
        "vocab_size": 101, "hidden_size": 80, "intermediate_size": 168, "num_hidden_layers": 3,
        "num_attention_heads": 8, "max_position_embeddings": 128, "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
        **rope(partial_rotary_factor=partial_rotary_factor),
    } | changes  # fmt: skip
    return randomize(PhiForCausalLM(PhiConfig(**config, attn_implementation="eager")), 6**0.5)


def phi3(long=None, factors=FACTORS, **changes):
    """With ``long`` that many tokens have the short factors of long rope (6 rotary pairs)."""
    config = {
        "vocab_size": 103, "hidden_size": 96, "intermediate_size": 136, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-2,
        "max_position_embeddings": 131072 if long else 256,
        "original_max_position_embeddings": long or 256,
        "pad_token_id": 0, "tie_word_embeddings": False, **rope(),
    }  # fmt: skip
    if long:
        original = {} if FOUR else {"original_max_position_embeddings": long}
        config |= rope("longrope", **factors, **original)
    config |= changes
    return randomize(Phi3ForCausalLM(Phi3Config(**config, attn_implementation="eager")), 6**0.5)


def phi3_small(long=None, **changes):
    config = {
        "vocab_size": 107, "hidden_size": 96, "ff_intermediate_size": 136, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "rope_embedding_base": 5e3,
        "max_position_embeddings": 131072 if long else 256,
        "gegelu_limit": 0.5, "gegelu_pad_to_256": False, "blocksparse_block_size": 4,
        "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 5,
        "dense_attention_every_n_layers": 2, "layer_norm_epsilon": 1e-2,
        "mup_width_multiplier": 3.0, "mup_embedding_multiplier": 7.0,
        "architectures": ["Phi3SmallForCausalLM"],
    }  # fmt: skip
    if long:
        config["rope_scaling"] = {
            "type": "longrope", **FACTORS, "short_mscale": 1.1, "long_mscale": 1.4,
            "original_max_position_embeddings": long,
        }  # fmt: skip
    return randomize(Phi3SmallForCausalLM(Phi3SmallConfig(**config | changes)), 30**0.5)


phi3_gqa = partial(phi3, long=20, num_key_value_heads=2)
MODELS = {
    "phi2": (phi2, "phi2"),
    "phi3-gqa": (phi3_gqa, "phi3-medium"),
    "phi3-tied": (partial(phi3, tie_word_embeddings=True), "phi3-mini"),
    "phi3-small": (partial(phi3_small, long=20, num_key_value_heads=2), "phi3-small"),
}
"""By name: the model's maker and its family."""

_LONGER = {kind: [*factors, 3.5, 4.5] for kind, factors in FACTORS.items()}
GROUPED = {
    name: (partial(maker, hidden_size=128, intermediate_size=384, **changes), family)
    for name, maker, family, changes in (
        ("phi2-grouped", phi2, "phi2", {}),
        ("phi3-gqa-grouped", phi3_gqa, "phi3-medium", {"factors": _LONGER}),
        ("phi3-tied-grouped", phi3, "phi3-mini", {"tie_word_embeddings": True}),
    )
}
"""The same with inputs in whole groups of 128, which int4 weights have a scale for."""


def write(name, directory, dtype=torch.float32, shard="5GB"):
    """A source directory in ``dtype``."""
    model = (MODELS | GROUPED)[name][0]().to(dtype)
    model.save_pretrained(directory, max_shard_size=shard, safe_serialization=True)
    return directory


def edit_config(directory, **changes):
    """Change keys of a config.json; "absent" removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return directory


def opened(name, directory, dtype=torch.float32, weights=None, device="cpu", **choices):
    """The reference of a written model."""
    family = registry.load((MODELS | GROUPED)[name][1]).family
    device = torch.device(device)
    return open_reference(family, directory, weights=weights, dtype=dtype, device=device, **choices)


def from_pretrained(name, directory, dtype=torch.float32):
    """Transformers' own whole model."""
    kind = Phi3SmallForCausalLM if name == "phi3-small" else AutoModelForCausalLM
    return kind.from_pretrained(directory, **{"torch_dtype" if FOUR else "dtype": dtype}).eval()
