"""phi-2's tensors, and where the three older layouts keep them.

Published today: separate q/k/v projections under ``model.layers.N``. The first transformers port
(4.36) fused them per head, [q; k; v] for each. The original phi-2 files and the sequential ones of
phi-1 and phi-1.5 hold [Q; K; V] in ``Wqkv``.
"""

from collections.abc import Mapping
from typing import Any

from phireg.api import (
    COLUMN,
    ROW,
    HFConfig,
    Linear,
    Norm,
    Rule,
    Rules,
    Table,
    columns,
    fuse,
    hookimpl,
    one_of,
    pad,
    parts,
    src,
    tied,
    ungroup,
)


@hookimpl
def phireg_weight_rules(config: Mapping[str, Any], hf: HFConfig) -> Rules:
    """Where the rows of each target module come from."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    last = f"layers.{layers + 1}"
    embedding = [
        src(name, vocab) for name in ("model.embed_tokens", "transformer.embd.wte", "layers.0.wte")
    ]
    norm = [src(name, hidden) for name in ("model.final_layernorm", "lm_head.ln", f"{last}.ln")]
    head = [pad(src(name, vocab)) for name in ("lm_head", "lm_head.linear", f"{last}.linear")]
    tied_head = [pad(tied(axis)) for axis in embedding]
    ties = hf.get("tie_word_embeddings")
    drop = dict.fromkeys(rotary_buffers(layers), "a constant the reader computes itself")
    if ties:
        drop |= {f"{axis.sources[0][0]}.weight": "tied to the embedding" for axis in head}
    return Rules(
        Table("transformer.vocab_embedding", one_of(*embedding), hidden),
        *(rule for i in range(layers) for rule in layer(i, config)),
        Norm("transformer.ln_f", one_of(*norm), bias=True),
        Linear(
            "lm_head",
            # Without a word from the config, the presence of a head's weight decides.
            one_of(*tied_head) if ties else one_of(*head, *(tied_head if ties is None else ())),
            hidden,
            COLUMN,
            bias=one_of(*head),
        ),
        drop=drop,
    )


def layer(i: int, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of layer ``i``."""
    hidden, size = config["hidden_size"], config["head_size"]
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    width = heads * size
    target = f"transformer.layers.{i}"
    now, original, sequential = f"model.layers.{i}", f"transformer.h.{i}", f"layers.{i + 1}"

    def either(name: str, older: str, rows: int) -> Any:
        return one_of(
            src(f"{now}.{name}", rows),
            src(f"{original}.{older}", rows),
            src(f"{sequential}.{older}", rows),
        )

    qkv = one_of(
        fuse(**{p: src(f"{now}.self_attn.{p}_proj", width) for p in "qkv"}, unit=size),
        ungroup(
            src(f"{now}.self_attn.query_key_value", 3 * width),
            groups=heads,
            unit=size,
            q=1,
            k=1,
            v=1,
        ),
        *(
            parts(src(f"{old}.mixer.Wqkv", 3 * width), q=width, k=width, v=width, unit=size)
            for old in (original, sequential)
        ),
    )
    return (
        Norm(f"{target}.input_layernorm", either("input_layernorm", "ln", hidden), bias=True),
        Linear(f"{target}.attention.qkv", qkv, hidden, COLUMN, bias=True),
        Linear(
            f"{target}.attention.dense",
            either("self_attn.dense", "mixer.out_proj", hidden),
            columns(width, unit=size),
            ROW,
            bias=True,
        ),
        Linear(f"{target}.mlp.fc", either("mlp.fc1", "mlp.fc1", inner), hidden, COLUMN, bias=True),
        Linear(f"{target}.mlp.proj", either("mlp.fc2", "mlp.fc2", hidden), inner, ROW, bias=True),
    )


def rotary_buffers(layers: int) -> tuple[str, ...]:
    """Buffers that some revisions saved with the weights."""
    return tuple(
        f"{layer}.rotary_emb.inv_freq"
        for i in range(layers)
        for layer in (
            f"model.layers.{i}.self_attn",
            f"transformer.h.{i}.mixer",
            f"layers.{i + 1}.mixer",
        )
    )
