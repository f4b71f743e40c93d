"""A good tiny Phi-3 checkpoint: float16, three shards and their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from helpers.source_shapes import phi3_shapes

LAYERS, HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 2, 32, 4, 2, 48, 37
HEAD_DIM = HIDDEN // HEADS
SHARDS = 3
INDEX = "model.safetensors.index.json"


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "intermediate_size": INTERMEDIATE, "vocab_size": VOCAB, "rms_norm_eps": 1e-05,
        "hidden_act": "silu", "max_position_embeddings": 64, "original_max_position_embeddings": 64,
        "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": None,
        "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 1,
        "eos_token_id": 32, "pad_token_id": 32, "torch_dtype": "float16",
        "transformers_version": "4.40.2", "use_cache": True,
    }  # fmt: skip


def tiny_tensors() -> dict[str, np.ndarray]:
    shapes = phi3_shapes(tiny_config())
    random = np.random.default_rng(0)
    return {name: random.normal(0, 0.15, shape).astype("f2") for name, shape in shapes.items()}


def make_tiny_phi3(directory: Path) -> None:
    """Write the good checkpoint: float16, three shards cut without regard to layers, an index."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", tiny_config())
    write_shards(directory, tiny_tensors())


def write_shards(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    names = list(tensors)
    per_shard = -(-len(names) // SHARDS)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        part = names[shard * per_shard : (shard + 1) * per_shard]
        save_file({n: tensors[n] for n in part}, shard_path(directory, shard), {"format": "pt"})
        weight_map |= {name: shard_path(directory, shard).name for name in part}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, index)


def shard_path(directory: Path, shard: int = 0) -> Path:
    return directory / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
