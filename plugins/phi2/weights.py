"""phi-2's weight rules, for the published layout and three older ones.

The published files have separate q/k/v projections under ``model.layers.N``. The first transformers
port (4.36) fused them per head, [q; k; v] for each. The original phi-2 files and the sequential
ones of phi-1 and phi-1.5 hold [Q; K; V] in ``Wqkv``.
"""

from collections.abc import Mapping
from typing import Any

import phireg.api as ph


@ph.hookimpl
def phireg_weight_rules(config: Mapping[str, Any], hf: ph.HFConfig) -> ph.Rules:
    """Map source rows to target modules."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    last = f"layers.{layers + 1}"
    embedding = [
        ph.src(name, vocab)
        for name in ("model.embed_tokens", "transformer.embd.wte", "layers.0.wte")
    ]
    norm = [ph.src(name, hidden) for name in ("model.final_layernorm", "lm_head.ln", f"{last}.ln")]
    head = [ph.pad(ph.src(name, vocab)) for name in ("lm_head", "lm_head.linear", f"{last}.linear")]
    tied_head = [ph.pad(ph.tied(axis)) for axis in embedding]
    ties = config["tie_word_embeddings"]
    heads = [f"{axis.sources[0][0]}.weight" for axis in head]
    return ph.Rules(
        ph.Table("transformer.vocab_embedding", ph.one_of(*embedding), hidden),
        *(rule for i in range(layers) for rule in layer(i, config)),
        ph.Norm("transformer.ln_f", ph.one_of(*norm), bias=True),
        ph.Linear(
            "lm_head",
            ph.one_of(*(tied_head if ties else head)),
            hidden,
            ph.COLUMN,
            bias=ph.one_of(*head),
        ),
        drop=dict.fromkeys(heads, "tied to the embedding") if ties else None,
    )


def layer(i: int, config: Mapping[str, Any]) -> tuple[ph.Rule, ...]:
    """Build the rules of layer ``i``."""
    hidden, size = config["hidden_size"], config["head_size"]
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    width = heads * size
    target = f"transformer.layers.{i}"
    now, original, sequential = f"model.layers.{i}", f"transformer.h.{i}", f"layers.{i + 1}"

    def either(name: str, older: str, rows: int) -> Any:
        return ph.one_of(
            ph.src(f"{now}.{name}", rows),
            ph.src(f"{original}.{older}", rows),
            ph.src(f"{sequential}.{older}", rows),
        )

    qkv = ph.one_of(
        ph.fuse(**{p: ph.src(f"{now}.self_attn.{p}_proj", width) for p in "qkv"}, unit=size),
        ph.ungroup(
            ph.src(f"{now}.self_attn.query_key_value", 3 * width),
            groups=heads,
            unit=size,
            q=1,
            k=1,
            v=1,
        ),
        *(
            ph.parts(ph.src(f"{old}.mixer.Wqkv", 3 * width), q=width, k=width, v=width, unit=size)
            for old in (original, sequential)
        ),
    )
    return (
        ph.Norm(f"{target}.input_layernorm", either("input_layernorm", "ln", hidden), bias=True),
        ph.Linear(f"{target}.attention.qkv", qkv, hidden, ph.COLUMN, bias=True),
        ph.Linear(
            f"{target}.attention.dense",
            either("self_attn.dense", "mixer.out_proj", hidden),
            ph.columns(width, unit=size),
            ph.ROW,
            bias=True,
        ),
        ph.Linear(
            f"{target}.mlp.fc", either("mlp.fc1", "mlp.fc1", inner), hidden, ph.COLUMN, bias=True
        ),
        ph.Linear(
            f"{target}.mlp.proj", either("mlp.fc2", "mlp.fc2", hidden), inner, ph.ROW, bias=True
        ),
    )


@ph.hookimpl
def phireg_quant_rules(config: Mapping[str, Any], scheme: str) -> ph.QuantRules:
    """Quantize every linear; exporters write phi-2's rows in the reader's order."""
    note = (
        f"TensorRT-LLM's reader takes {scheme} for phi-2, but its support matrix does not list it "
        "and its own quantize script cannot make it"
    )
    return ph.every_linear(config, notes=() if scheme in ("W8A16", "W4A16") else (note,))
