"""What tests of the kernels share: a device, numbers, and a model's spec."""

from dataclasses import replace

import torch

from phireg.reader.spec import parse_spec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


ACTIVATIONS = [("swiglu", None), ("gegelu", None), ("gegelu", 0.4), ("gelu_tanh", None)]


def spec(**changes):
    values = {
        "architecture": "Phi3ForCausalLM", "dtype": "float32", "vocab_size": 10, "hidden_size": 48,
        "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_size": 12, "hidden_act": "swiglu",
        "max_position_embeddings": 64, "rotary_base": 100.0, "rotary_pct": 1.0,
    }  # fmt: skip
    return replace(parse_spec(values), **changes)
