"""phi-2, phi-1.5 and phi-1: parallel attention and MLP, one LayerNorm per layer, biases."""

from phireg_plugins.phi2 import config, weights

import phireg.api as ph

FAMILY = ph.Family(
    name="phi2",
    architectures=("PhiForCausalLM", "MixFormerSequentialForCausalLM"),
    model_types=("phi", "phi-msft", "mixformer-sequential"),
    steps=(config, weights),
    api=1,
    published=(
        ph.PublishedModel(
            "microsoft/phi-2",
            {
                "architectures": ["PhiForCausalLM"],
                "model_type": "phi",
                "hidden_size": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "intermediate_size": 10240,
                "vocab_size": 51200,
                "max_position_embeddings": 2048,
                "hidden_act": "gelu_new",
                "partial_rotary_factor": 0.4,
                "tie_word_embeddings": False,
                "torch_dtype": "float16",
            },
        ),
    ),
    demo="phireg_plugins.phi2:demo",
)
