"""Phi-3 as transformers saves it, and what the reader must get: for mini's and medium's tests.

Sizes are awkward on purpose: heads of 6 dimensions, an odd vocabulary, and an intermediate size
whose shares are odd.
"""

import torch
from family_checks import kv_share, randomize, share, vocab_share
from helpers.source_shapes import phi3_shapes

source_shapes = phi3_shapes
LAYERS, HEADS, HEAD_SIZE, INNER, VOCAB = 2, 8, 6, 24, 97
HIDDEN = HEADS * HEAD_SIZE


def tiny(directory, kv_heads, dtype="float32", vocab=None, **changes):
    """Write a random model as transformers saves it; return its tensors."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {
        **{"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
        **{"num_key_value_heads": kv_heads, "max_position_embeddings": 64},
        **{"original_max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
        "pad_token_id": 2,
    }
    model = Phi3ForCausalLM(Phi3Config(**{**sizes, **changes}))
    if vocab:
        model.resize_token_embeddings(vocab)
    model = randomize(model, dtype)
    model.save_pretrained(directory)
    return model.state_dict()


def split_qkv(qkv, kv_heads):
    """The fused rows are all of q, all of k, all of v."""
    q, kv = HEADS * HEAD_SIZE, kv_heads * HEAD_SIZE
    return qkv[:q], qkv[q : q + kv], qkv[q + kv :]


def expected(state, kv_heads, tp):
    """The rank files by the book: halves swapped, every segment cut by itself."""
    ranks = []
    for rank in range(tp):
        tensors = {
            "transformer.vocab_embedding.weight": state["model.embed_tokens.weight"],
            "transformer.ln_f.weight": state["model.norm.weight"],
            "lm_head.weight": vocab_share(state["lm_head.weight"], tp, rank),
        }
        for i in range(LAYERS):
            old, new = f"model.layers.{i}", f"transformer.layers.{i}"
            q, k, v = split_qkv(state[f"{old}.self_attn.qkv_proj.weight"], kv_heads)
            gate, up = state[f"{old}.mlp.gate_up_proj.weight"].split(INNER)
            dense = state[f"{old}.self_attn.o_proj.weight"]
            proj = state[f"{old}.mlp.down_proj.weight"]
            kv = [kv_share(part, kv_heads, tp, rank) for part in (k, v)]
            tensors |= {
                f"{new}.input_layernorm.weight": state[f"{old}.input_layernorm.weight"],
                f"{new}.post_layernorm.weight": state[f"{old}.post_attention_layernorm.weight"],
                f"{new}.attention.qkv.weight": torch.cat([share(q, tp, rank), *kv]),
                f"{new}.attention.dense.weight": share(dense, tp, rank, dim=1),
                f"{new}.mlp.fc.weight": torch.cat([share(up, tp, rank), share(gate, tp, rank)]),
                f"{new}.mlp.proj.weight": share(proj, tp, rank, dim=1),
            }
        ranks.append(tensors)
    return ranks


def separate(state, kv_heads):
    """The same model with the projections some fine-tunes have."""
    state = dict(state)
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = split_qkv(state.pop(f"{attention}.qkv_proj.weight"), kv_heads)
        for name, part in zip("qkv", qkv, strict=True):
            state[f"{attention}.{name}_proj.weight"] = part
        gate, up = state.pop(f"{mlp}.gate_up_proj.weight").split(INNER)
        state |= {f"{mlp}.gate_proj.weight": gate, f"{mlp}.up_proj.weight": up}
    return state
