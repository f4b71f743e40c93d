"""Phi-3-small: grouped qkv, interleaved gegelu, block-sparse attention, muP, a tied head."""

from phireg_plugins.phi3_small import config, weights

import phireg.api as ph

SMALL_8K = {
    "architectures": ["Phi3SmallForCausalLM"],
    "model_type": "phi3small",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "ff_intermediate_size": 14336,
    "vocab_size": 100352,
    "max_position_embeddings": 8192,
    "hidden_act": "gegelu",
    "layer_norm_epsilon": 1e-05,
    "rope_embedding_base": 1000000,
    "torch_dtype": "bfloat16",
}

FAMILY = ph.Family(
    name="phi3-small",
    architectures=("Phi3SmallForCausalLM",),
    model_types=("phi3small",),
    steps=(config, weights),
    api=1,
    published=(
        ph.PublishedModel("microsoft/Phi-3-small-8k-instruct", SMALL_8K),
        ph.PublishedModel(
            "microsoft/Phi-3-small-128k-instruct", {**SMALL_8K, "max_position_embeddings": 131072}
        ),
    ),
    reference="phireg_plugins.phi3_small.reference:Phi3SmallForCausalLM",
    tokenizer="phireg_plugins.phi3_small.tokenizer:load_tokenizer",
    demo="phireg_plugins.phi3_small:demo",
)
