"""Phi-3.5-mini, which is Phi-3-mini by another name, and Phi-3.5-MoE, which has its own mapping."""

from phireg_plugins.phi3_mini import FAMILY as PHI3_MINI

from phireg.api import Family, PublishedModel
from phireg_phi35 import config, quant, weights

MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

MOE = {
    **MINI,
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "hidden_size": 4096,
    "num_key_value_heads": 8,
    "intermediate_size": 6400,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
    "attention_bias": True,
    "lm_head_bias": True,
}

# Nothing in its config.json tells it from Phi-3-mini-128k, and nothing needs to: --family auto
# takes phi3-mini, which maps it in the same way.
PHI35_MINI = PHI3_MINI.derive(
    "phi35-mini",
    api=1,
    published=(PublishedModel("microsoft/Phi-3.5-mini-instruct", MINI),),
)

PHI35_MOE = Family(
    name="phi35-moe",
    # As published, and as transformers 5 calls its class.
    architectures=("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    model_types=("phimoe",),
    steps=(config, weights, quant),
    api=1,
    published=(PublishedModel("microsoft/Phi-3.5-MoE-instruct", MOE),),
    reference="phireg_phi35.reference:PhiMoEForCausalLM",
)
