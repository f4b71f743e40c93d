"""Tiny source models of the four families, shaped so that mistakes show, and their checkpoints.

Queries and keys are large, biases and norms random, epsilons raised, KV heads neither one nor all,
vocabularies odd, and the prompts that verify chooses cross both thresholds.
"""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import torch
from phireg_plugins.phi3_small.reference import Phi3SmallConfig, Phi3SmallForCausalLM
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM, PhiConfig, PhiForCausalLM

import phireg
from phireg.calibration.calibrate import run_calibration
from phireg.calibration.settings import Settings


def randomize(model, boost):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "query_key_value")):
                parameter.mul_(boost)
    return model


def phi2():
    config = PhiConfig(
        vocab_size=101, hidden_size=80, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, hidden_act="gelu_new",
        layer_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.4
        },
    )  # fmt: skip
    return randomize(PhiForCausalLM(config), 2.5)


LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "partial_rotary_factor": 1.0,
    "short_factor": [1.1, 1.2, 1.4, 1.7, 2.1, 2.6],
    "long_factor": [2.0, 5.0, 9.5, 3.0, 12.0, 30.0],
    "original_max_position_embeddings": 52,
}  # fmt: skip


def phi3_mini():
    config = Phi3Config(
        vocab_size=103, hidden_size=96, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=131072,
        original_max_position_embeddings=52, rms_norm_eps=1e-2, pad_token_id=0,
        tie_word_embeddings=False, rope_parameters=LONG_ROPE,
    )  # fmt: skip
    return randomize(Phi3ForCausalLM(config), 2.5)


def phi3_medium():
    config = Phi3Config(
        vocab_size=105, hidden_size=96, intermediate_size=136, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
        rms_norm_eps=1e-2, pad_token_id=0, tie_word_embeddings=False, sliding_window=40,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    return randomize(Phi3ForCausalLM(config), 2.5)


def phi3_small():
    config = Phi3SmallConfig(
        vocab_size=107, hidden_size=96, ff_intermediate_size=136, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=131072,
        rope_embedding_base=5e3, gegelu_limit=0.5, gegelu_pad_to_256=False,
        blocksparse_block_size=4, blocksparse_num_local_blocks=2, blocksparse_vert_stride=5,
        dense_attention_every_n_layers=2, layer_norm_epsilon=1e-2,
        mup_width_multiplier=3.0, mup_embedding_multiplier=7.0,
        architectures=["Phi3SmallForCausalLM"],
        rope_scaling={
            "type": "longrope", "short_factor": LONG_ROPE["short_factor"],
            "long_factor": LONG_ROPE["long_factor"], "short_mscale": 1.1, "long_mscale": 1.4,
            "original_max_position_embeddings": 52,
        },
    )  # fmt: skip
    return randomize(Phi3SmallForCausalLM(config), 4.0)


FAMILIES = {
    "phi2": phi2, "phi3-mini": phi3_mini, "phi3-small": phi3_small, "phi3-medium": phi3_medium
}  # fmt: skip
ROOT = []


def source(family, dtype="float32"):
    """The directory of a family's source; written once."""
    directory = ROOT[0] / f"{family}-{dtype}"
    if not directory.exists():
        FAMILIES[family]().to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def converted(family, tp_size=1, dtype="float32"):
    """A correct checkpoint; written once, and not to be changed."""
    directory = ROOT[0] / f"{family}-tp{tp_size}-{dtype}-checkpoint"
    if not directory.exists():
        plan = phireg.plan(source(family), family=family, tp_size=tp_size, dtype=dtype)
        phireg.convert(plan, directory)
    return directory


def copied(family, tp_size, to, dtype="float32"):
    """A copy of a correct checkpoint, to be damaged."""
    return Path(shutil.copytree(converted(family, tp_size, dtype), to))


def edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def load_ranks(directory):
    return [load_file(path) for path in sorted(directory.glob("rank*.safetensors"))]


def save_ranks(directory, ranks):
    for rank, tensors in enumerate(ranks):
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, directory / f"rank{rank}.safetensors")


@lru_cache(None)
def statistics(family):
    """Maxima over random rows, of the source in its own dtype."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(0, 100, (60,), generator=generator).tolist()}] * 8
    path = ROOT[0] / f"{family}-rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    plan = phireg.plan(source(family), family=family)
    settings = Settings(file=path, size=8, device="cpu")
    return run_calibration(plan.chosen.family, plan.source, settings)


def quantized(family, qformat, cache=None, tp_size=1, dtype="float16", alpha=1.0):
    """A correct quantized checkpoint; written once, and not to be changed."""
    directory = ROOT[0] / f"{family}-{qformat}-{cache}-tp{tp_size}-{dtype}-{alpha}"
    if not directory.exists():
        form = {"tp_size": tp_size, "dtype": dtype, "qformat": qformat, "kv_cache_dtype": cache}
        plan = phireg.plan(source(family), family=family, **form)
        phireg.quantize(plan, directory, statistics(family), alpha=alpha)
    return directory
