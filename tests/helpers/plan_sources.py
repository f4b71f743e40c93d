"""Tiny sources whose every element is its own address, and plans of them. No torch."""

import json
import math

import numpy as np
from safetensors.numpy import save_file

from helpers.source_shapes import phi3_shapes, small_shapes, with_bias
from phireg.config.hf import HFConfig
from phireg.planning.build import build_plan
from phireg.planning.model import Options
from phireg.registry import FamilyChoice
from phireg.source.readings import open_source

LAYERS, HEADS, SIZE, INNER, VOCAB = 3, 4, 6, 20, 37
HIDDEN = HEADS * SIZE
COMMON = {
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": HIDDEN,
    "vocab_size": VOCAB, "max_position_embeddings": 64, "torch_dtype": "float32",
}  # fmt: skip
PHI2 = COMMON | {
    "architectures": ["PhiForCausalLM"], "model_type": "phi", "intermediate_size": INNER,
    "hidden_act": "gelu_new", "partial_rotary_factor": 0.7,
}  # fmt: skip
PHI3 = COMMON | {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "intermediate_size": INNER,
    "hidden_act": "silu",
}  # fmt: skip
SMALL = COMMON | {
    "architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small",
    "ff_intermediate_size": INNER, "num_key_value_heads": 2,
}  # fmt: skip


def phi2_shapes():
    h = HIDDEN
    shapes = {"model.embed_tokens.weight": (VOCAB, h), "lm_head.weight": (VOCAB, h)}
    shapes["model.final_layernorm.weight"] = (h,)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (h,)
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (h, h) for p in "qkv"}
        shapes[f"{layer}.self_attn.dense.weight"] = (h, h)
        shapes[f"{layer}.mlp.fc1.weight"] = (INNER, h)
        shapes[f"{layer}.mlp.fc2.weight"] = (h, INNER)
    return with_bias(shapes)


def tied(shapes):
    return {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}


MEDIUM, ONE = ({**PHI3, "num_key_value_heads": kv_heads} for kv_heads in (2, 1))
MODELS = {
    "phi2": ("phi2", PHI2, phi2_shapes()),
    "phi2-tied": ("phi2", {**PHI2, "tie_word_embeddings": True}, tied(phi2_shapes())),
    "mini": ("phi3-mini", PHI3, phi3_shapes(PHI3)),
    "mini-tied": ("phi3-mini", {**PHI3, "tie_word_embeddings": True}, tied(phi3_shapes(PHI3))),
    "medium": ("phi3-medium", MEDIUM, phi3_shapes(MEDIUM)),
    "one-kv-head": ("phi3-medium", ONE, phi3_shapes(ONE)),
    "small": ("phi3-small", SMALL, small_shapes(SMALL)),
}


def addresses(shapes):
    """Every element of every tensor has a number of its own."""
    tensors, start = {}, 1
    for name, shape in sorted(shapes.items()):
        count = math.prod(shape)
        tensors[name] = np.arange(start, start + count, dtype=np.uint32).reshape(shape)
        start += count
    return tensors


def write(directory, config, tensors):
    """Write a source; unsigned numbers are stored as the bits of float32."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    as_float = {n: t.view(np.float32) if t.dtype == np.uint32 else t for n, t in tensors.items()}
    save_file(as_float, directory / "model.safetensors")
    return directory


def planned(family, directory, **options):
    """The plan of a family object, without looking anything up."""
    hf = HFConfig(json.loads((directory / "config.json").read_text()))
    return build_plan(FamilyChoice(family, None), hf, open_source(directory), Options(**options))
