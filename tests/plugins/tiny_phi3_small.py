"""Tiny Phi-3-small checkpoints in the published layout, shaped so that mistakes show."""

import torch
from helpers.source_shapes import small_shapes

# 6 heads of 6 in 2 groups; blocks of 4, 2 of them local, stripes every 4th block or so.
TINY = {
    "architectures": ["Phi3SmallForCausalLM"],
    "model_type": "phi3small",
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3_small.Phi3SmallForCausalLM"},
    "vocab_size": 53,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "ff_intermediate_size": 22,
    "max_position_embeddings": 64,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "hidden_act": "gegelu",
    "gegelu_limit": 0.5,
    "blocksparse_block_size": 4,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_vert_stride": 4,
    "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2,
    "layer_norm_epsilon": 0.1,
    "mup_use_scaling": True,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
LONG_ROPE = {
    "type": "su",
    "short_factor": [1.1, 1.3, 1.7],
    "long_factor": [2.0, 5.0, 9.0],
    "short_mscale": 1.2,
    "long_mscale": 1.4,
    "original_max_position_embeddings": 20,
}
LONG = {
    **TINY,
    "max_position_embeddings": 96,
    "rope_scaling": LONG_ROPE,
    "dense_attention_every_n_layers": 3,
}


source_shapes = small_shapes


def random_tensors(config, seed=0):
    """Random weights: norms and biases far from 1 and 0, attention sharp enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in source_shapes(config).items():
        tensors[name] = torch.randn(shape, generator=generator) * 0.15
        if "norm" in name:
            tensors[name] = tensors[name] * 2 + ("weight" in name)
        if "query_key_value" in name:
            tensors[name] *= 4
    return tensors


def random_ids(config, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randint(2, config["vocab_size"], shape, generator=generator)
