"""Phi-3.5-MoE: layer norms, biases, and experts of which a token gets two."""

from phireg_plugins.phi35_moe import config, weights

import phireg.api as ph

MOE = {
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 6400,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
    "attention_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

FAMILY = ph.Family(
    name="phi3.5-moe",
    # As published, and as transformers 5 calls its class.
    architectures=("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    model_types=("phimoe",),
    steps=(config, weights),
    api=1,
    published=(ph.PublishedModel("microsoft/Phi-3.5-MoE-instruct", MOE),),
    reference="phireg_plugins.phi35_moe.reference:PhiMoEForCausalLM",
    demo="phireg_plugins.phi35_moe:demo",
)
