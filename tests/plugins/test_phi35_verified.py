"""phireg verify on Phi-3.5-MoE checkpoints in 16 bits, whose routers stay float32."""

import pytest
import torch
from phireg_plugins.phi35_moe import FAMILY as PHI35_MOE
from safetensors.torch import load_file, save_file
from unregistered import convert, planned

from phireg.testing import write_tiny_model
from phireg.verification.compute import ComputedChecks

SIZES = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 20, "num_local_experts": 6, "num_experts_per_tok": 2,
    "router_jitter_noise": 0.3, "vocab_size": 97, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3, "hidden_act": "silu", "attention_bias": True, "lm_head_bias": True,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROUTER = "transformer.layers.1.mlp.router.weight"


def problems(source, checkpoint, dtype):
    plan = planned(PHI35_MOE, source, dtype=dtype)
    checks = ComputedChecks(checkpoint, plan.config, torch.device("cpu"))
    return checks.run("logits", plan)[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_source(dtype, tmp_path):
    """The reference's routers are not rounded either; a rounded one is found."""
    source = tmp_path / "source"
    write_tiny_model(PHI35_MOE, SIZES, source)
    output = convert(PHI35_MOE, source, tmp_path / "ckpt", dtype=dtype)
    assert problems(source, output, dtype) == []
    tensors = load_file(output / "rank0.safetensors")
    tensors[ROUTER] = tensors[ROUTER].to(torch.bfloat16).float()
    save_file(tensors, output / "rank0.safetensors")
    assert problems(source, output, dtype)
