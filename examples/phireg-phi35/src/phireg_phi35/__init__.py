"""Phi-3.5-mini, with Phi-3-mini's mapping, and Phi-3.5-MoE, with its own."""

from phireg_plugins.phi3_mini import FAMILY as PHI3_MINI

import phireg.api as ph
from phireg_phi35 import config, weights

MINI = {**PHI3_MINI.published[0].config, "max_position_embeddings": 131072}

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

# Its config.json is like Phi-3-mini-128k's, so --family auto takes phi3-mini, whose mapping is the
# same.
PHI35_MINI = PHI3_MINI.derive(
    "phi35-mini",
    api=1,
    published=(ph.PublishedModel("microsoft/Phi-3.5-mini-instruct", MINI),),
)

PHI35_MOE = ph.Family(
    name="phi35-moe",
    # As published, and as transformers 5 calls its class.
    architectures=("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    model_types=("phimoe",),
    steps=(config, weights),
    api=1,
    published=(ph.PublishedModel("microsoft/Phi-3.5-MoE-instruct", MOE),),
    reference="phireg_phi35.reference:PhiMoEForCausalLM",
)
