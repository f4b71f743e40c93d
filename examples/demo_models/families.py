"""Configs of the demo models: each family's published config.json with small, awkward sizes.

Heads, groups, vocabulary and rotary sizes are chosen so that every mistake a conversion can make
changes what the model says: 12 rotated dimensions of 32 in phi2; long rope from 65 tokens on in
phi3-mini; in phi3-small blocks of 16 tokens of which two are local, a stripe on every third, which
4 heads (of TP 2) do not divide into, and activations that reach the gegelu limit; 4 heads to a
KV head in phi3-medium and phi4; 12 rotated dimensions of 16, long rope and a tied head in
phi4-mini; in phi3.5-moe two experts of eight, router scores near each other, and different factors
on cos and sin for short and long texts. Splits up to TP 2 are even in all of them. Phi-3.5-mini is
Phi-3-mini with other rope factors, and shares its demo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from phireg_plugins.phi3_small.reference import Phi3SmallForCausalLM
from phireg_plugins.phi35_moe.reference import PhiMoEForCausalLM
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 1021

# fmt: off
_PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "original_max_position_embeddings": 512,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "phi2": {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "embd_pdrop": 0.0,
        "eos_token_id": 0,
        "hidden_act": "gelu_new",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    },
    "phi3-mini": {
        **_PHI3,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.0, 1.0, 1.02, 1.03, 1.05, 1.08, 1.1,
                             1.12, 1.15, 1.2, 1.25, 1.3, 1.38, 1.45, 1.5],
            "long_factor": [1.0, 1.03, 1.07, 1.12, 1.25, 1.42, 1.7, 2.1,
                            2.6, 3.2, 4.0, 4.9, 5.8, 6.6, 7.3, 8.0],
        },
    },
    "phi3-small": {
        "architectures": ["Phi3SmallForCausalLM"],
        "model_type": "phi3small",
        "attention_bias": False,
        "attention_dropout_prob": 0.0,
        "blocksparse_block_size": 16,
        "blocksparse_homo_head_pattern": False,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 3,
        "bos_token_id": 926,
        "dense_attention_every_n_layers": 2,
        "embedding_dropout_prob": 0.0,
        "eos_token_id": 926,
        "ff_dim_multiplier": None,
        "ff_intermediate_size": 352,
        "ffn_dropout_prob": 0.0,
        "gegelu_limit": 2.0,
        "gegelu_pad_to_256": False,
        "hidden_act": "gegelu",
        "hidden_size": 128,
        "initializer_range": 0.06,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 512,
        "mup_attn_multiplier": 1.0,
        "mup_embedding_multiplier": 5.0,
        "mup_use_scaling": True,
        "mup_width_multiplier": 2.0,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "rope_embedding_base": 10000,
        "rope_position_scale": 1.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    },
    "phi3-medium": {
        **_PHI3,
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
    },
    "phi4": {
        **_PHI3,
        "bos_token_id": 1017,
        "eos_token_id": 1017,
        "hidden_size": 96,
        "initializer_range": 0.05,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 1017,
        "rope_theta": 250000.0,
    },
    "phi4-mini": {
        **_PHI3,
        "bos_token_id": 1016,
        "eos_token_id": 1016,
        "full_attn_mod": 1,
        "hidden_size": 96,
        "initializer_range": 0.05,
        "interpolate_factor": 1,
        "intermediate_size": 256,
        "lm_head_bias": False,
        "mlp_bias": False,
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 64,
        "pad_token_id": 1016,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.02, 1.1, 1.2, 1.35, 1.5],
            "long_factor": [1.0, 1.12, 1.7, 3.2, 5.8, 8.0],
        },
        "tie_word_embeddings": True,
    },
    "phi3.5-moe": {
        **_PHI3,
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,
        "hidden_size": 64,
        "initializer_range": 0.05,
        "input_jitter_noise": 0.01,
        "intermediate_size": 64,
        "lm_head_bias": True,
        "model_type": "phimoe",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5],
            "long_factor": [1.0, 1.07, 1.25, 1.7, 2.6, 4.0, 5.8, 8.0],
            "short_mscale": 1.1,
            "long_mscale": 1.25,
            "original_max_position_embeddings": 64,
        },
        "router_jitter_noise": 0.2,
    },
}
# fmt: on
FAMILIES = tuple(CONFIGS)
PUBLISHED_DTYPE = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def model_class(family: str) -> Any:
    """Return the class that loads the family's directory."""
    own = {"phi3-small": Phi3SmallForCausalLM, "phi3.5-moe": PhiMoEForCausalLM}
    return own.get(family, AutoModelForCausalLM)


def write_config(directory: Path, family: str) -> None:
    """Write config.json and generation_config.json as published, with transformers 4's keys."""
    config = CONFIGS[family]
    stops = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    stops["pad_token_id"] = config["eos_token_id"]
    _write(directory / "config.json", {"_name_or_path": f"phireg-demo/{family}", **config})
    _write(directory / "generation_config.json", {"_from_model_config": True, **stops})


def new_model(directory: Path, family: str) -> Any:
    """Make an untrained float32 model of the config.json in ``directory``."""
    cls = model_class(family)
    if cls is AutoModelForCausalLM:
        return cls.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    return cls(cls.config_class.from_pretrained(directory))


def save_weights(model: nn.Module, directory: Path, family: str) -> None:
    """Write model.safetensors in the published names and dtype."""
    dtype = PUBLISHED_DTYPE[CONFIGS[family]["torch_dtype"]]
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        # A tied head is the embedding; the published files have no second copy.
        if not (family in ("phi3-small", "phi4-mini") and name == "lm_head.weight")
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load_model(directory: Path, family: str, device: str = "cpu") -> Any:
    """Load the saved model in float32."""
    model = model_class(family).from_pretrained(directory, dtype=torch.float32)
    return model.eval().to(device)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
