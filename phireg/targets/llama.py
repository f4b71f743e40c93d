"""A model of Phi-3's architecture as one of transformers' Llama class: ``--as llama``.

The arithmetic is the same where heads rotate whole and every position attends to all before it;
only the fused projections become separate ones. They are cut where the family's rules have the
parts of the fused ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from phireg.config.hf import HFConfig
from phireg.layout.axes import select
from phireg.layout.rules import Rule, Rules

_ENDS = {
    "transformer.vocab_embedding": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
}
_LAYER = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
    "attention.dense": "self_attn.o_proj",
    "mlp.proj": "mlp.down_proj",
}
_SEPARATED = {
    "attention.qkv": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    "mlp.fc": {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
}
"""Llama's modules by the parts of the fused ones, as Phi-3's rules name them."""

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    "tie_word_embeddings",
)
"""Keys of config.json that are TensorRT-LLM's, too."""

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "use_cache")


def llama_problems(fields: Mapping[str, Any], hf: HFConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys of ``fields`` that Llama's class has no equal of, and what is wrong."""
    if fields["architecture"] != "Phi3ForCausalLM":
        yield "architectures", "only models of Phi-3's architecture have Llama's arithmetic"
        return
    if fields["rotary_pct"] != 1.0:
        share = fields["rotary_pct"]
        yield "partial_rotary_factor", f"is {share}; Llama rotates all dimensions of a head"
    window, length = hf.get("sliding_window"), fields["max_position_embeddings"]
    if isinstance(window, int) and window < length:
        yield "sliding_window", f"is {window} of {length} positions; Llama attends to all of them"


def llama_rules(rules: Rules, num_layers: int) -> Rules:
    """Return rules whose targets are Llama's modules, from the family's rules for TensorRT-LLM."""
    made = [replace(rules[name], target=llama) for name, llama in _ENDS.items()]
    for layer in range(num_layers):
        before, after = f"transformer.layers.{layer}", f"model.layers.{layer}"
        for name, llama in _LAYER.items():
            made.append(replace(rules[f"{before}.{name}"], target=f"{after}.{llama}"))
        for name, names in _SEPARATED.items():
            made += [
                _part(rules[f"{before}.{name}"], part, f"{after}.{llama}")
                for part, llama in names.items()
            ]
    return Rules(*made, drop=rules.drop)


def _part(rule: Rule, part: str, target: str) -> Rule:
    return replace(rule, target=target, weight=tuple(select(axis, part) for axis in rule.weight))


def llama_config(fields: Mapping[str, Any], hf: HFConfig) -> dict[str, Any]:
    """Return Llama's config.json, in keys that transformers 4 and 5 read alike."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: fields[key] for key in _SAME},
        "head_dim": fields["head_size"],
        "hidden_act": "silu",
        "rms_norm_eps": fields["norm_epsilon"],
        "rope_theta": fields["rotary_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
    }
    if fields["position_embedding_type"] == "long_rope":
        original = fields["original_max_position_embeddings"]
        # Inside the block for transformers 5 and vLLM, at the top for transformers 4.
        config["original_max_position_embeddings"] = original
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": fields["longrope_scaling_short_factors"],
            "long_factor": fields["longrope_scaling_long_factors"],
            "factor": fields["max_position_embeddings"] / original,
            "original_max_position_embeddings": original,
        }
    return config | {key: value for key in _KEPT if (value := hf.get(key)) is not None}
