"""Conversion errors, planted into correct checkpoints by code of the tests' own.

Each entry damages config.json or the rank files as a real mistake would.
"""

from dataclasses import dataclass, field

import torch
from verify_sources import edit_config, load_ranks, save_ranks

HEADS = {"phi2": (4, 4, 20), "phi3-mini": (8, 8, 12), "phi3-small": (8, 4, 12),
         "phi3-medium": (8, 4, 12)}  # fmt: skip
L1 = "transformer.layers.1."
QKV, DENSE, FC, PROJ = (
    f"{L1}{name}.weight" for name in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
)
QKV_BIAS, DENSE_BIAS, PROJ_BIAS = (n.replace("weight", "bias") for n in (QKV, DENSE, PROJ))
SHORT, LONG = (f"longrope_scaling_{name}_factors" for name in ("short", "long"))


@dataclass(frozen=True)
class Planted:
    """One error.

    ``place`` is where it must be located, or None where it has no place. ``says`` must stand in the
    byte or config check's report. ``numeric`` is False where no logit changes.
    """

    family: str
    tp: int
    damage: object
    place: tuple | None
    says: str
    numeric: bool = True
    dtype: str = "float32"
    also: tuple = field(default=())


def config(**changes):
    def damage(directory, family):
        edit_config(directory, lambda values: values.update(changes))

    return damage


def config_exchange(left, right):
    def damage(directory, family):
        def change(values):
            values[left], values[right] = values[right], values[left]

        edit_config(directory, change)

    return damage


def config_without(key):
    return lambda directory, family: edit_config(directory, lambda values: values.pop(key))


def no_long_rope(directory, family):
    def change(values):
        del values[SHORT]
        values["position_embedding_type"] = "rope_gpt_neox"

    edit_config(directory, change)


def ranks(change):
    """Damage all ranks together: ``change(ranks, family)``."""

    def damage(directory, family):
        loaded = load_ranks(directory)
        change(loaded, family)
        save_ranks(directory, loaded)

    return damage


def each(name, change, only=None):
    """Replace one tensor on every rank (or on the given ones)."""

    def on_all(loaded, family):
        for rank, tensors in enumerate(loaded):
            if only is None or rank in only:
                tensors[name] = change(tensors[name])

    return ranks(on_all)


def qkv_rows(change, names=(QKV,)):
    """Rewrite a layer's q, k and v: ``change(q, k, v)`` per rank."""

    def on_all(loaded, family):
        heads, kv, size = HEADS[family]
        sizes = [n // len(loaded) * size for n in (heads, kv, kv)]
        for tensors in loaded:
            for name in names:
                tensors[name] = torch.cat(change(*tensors[name].split(sizes)))

    return ranks(on_all)


def whole_qkv(change, names=(QKV,)):
    """Build the ranks' qkv anew from the whole model's: ``change(q, k, v, family)`` -> pieces."""

    def on_all(loaded, family):
        heads, kv, size = HEADS[family]
        sizes = [n // len(loaded) * size for n in (heads, kv, kv)]
        for name in names:
            split = [tensors[name].split(sizes) for tensors in loaded]
            whole = [torch.cat([rank[n] for rank in split]) for n in range(3)]
            pieces = change(*whole, family).chunk(len(loaded))
            for tensors, piece in zip(loaded, pieces, strict=True):
                tensors[name] = piece

    return ranks(on_all)


def grouped(q, k, v, family):
    heads, kv, size = HEADS[family]
    group = heads // kv * size
    rows = []
    for g in range(kv):
        rows += [q[g * group : (g + 1) * group], k[g * size : (g + 1) * size]]
        rows.append(v[g * size : (g + 1) * size])
    return torch.cat(rows)


def heads_exchanged(a, b):
    def change(q, k, v):
        size = 12
        q = q.clone()
        q[a * size : (a + 1) * size], q[b * size : (b + 1) * size] = (
            q[b * size : (b + 1) * size].clone(),
            q[a * size : (a + 1) * size].clone(),
        )
        return q, k, v

    return change


def halves(x):
    return torch.cat(x.chunk(2)[::-1])


def cut_as_block(name):
    """Up and gate of the whole model in one piece, cut contiguously."""

    def on_all(loaded, family):
        split = [tensors[name].chunk(2) for tensors in loaded]
        whole = torch.cat([rank[n] for n in (0, 1) for rank in split])
        for tensors, piece in zip(loaded, whole.chunk(len(loaded)), strict=True):
            tensors[name] = piece

    return ranks(on_all)


def exchanged(left, right):
    def on_all(loaded, family):
        for tensors in loaded:
            tensors[left], tensors[right] = tensors[right], tensors[left]

    return ranks(on_all)


def layers_exchanged(a, b):
    def on_all(loaded, family):
        for tensors in loaded:
            for name in [n for n in tensors if f".layers.{a}." in n]:
                other = name.replace(f".layers.{a}.", f".layers.{b}.")
                tensors[name], tensors[other] = tensors[other], tensors[name]

    return ranks(on_all)


def ranks_exchanged(name):
    def on_all(loaded, family):
        moved = [tensors[name] for tensors in loaded]
        for tensors, tensor in zip(loaded, moved[1:] + moved[:1], strict=True):
            tensors[name] = tensor

    return ranks(on_all)


def zero_block(x):
    x = x.clone()
    x[4:20, 8:24] = 0
    return x


def padding_first(names):
    """lm_head's padding rows before the vocabulary instead of behind it."""

    def on_all(loaded, family):
        for name in names:
            whole = torch.cat([tensors[name] for tensors in loaded])
            for tensors, piece in zip(loaded, whole.roll(1, 0).chunk(len(loaded)), strict=True):
                tensors[name] = piece

    return ranks(on_all)


def without(name):
    return ranks(lambda loaded, family: [tensors.pop(name) for tensors in loaded])


def untied(loaded, family):
    generator = torch.Generator().manual_seed(1)
    for tensors in loaded:
        shape = tensors["lm_head.weight"].shape
        tensors["lm_head.weight"] = torch.randn(shape, generator=generator) * 0.1


def permuted_columns(x):
    return x[:, torch.arange(x.shape[1]).roll(5)]


def truncated(x):
    """What cutting float32 to bfloat16 without rounding gives; x is already rounded."""
    bits = x.view(torch.int16)
    return torch.where(bits > 0, bits - 1, bits).view(torch.bfloat16)


A0, M0, A1, M1 = ((layer, part) for layer in (0, 1) for part in ("attention", "mlp"))
HEAD = (None, "lm_head")
SMALL, MINI, MEDIUM = "phi3-small", "phi3-mini", "phi3-medium"

PLANTED = {
    # rows of attention
    "k and v exchanged": Planted(
        MEDIUM, 1, qkv_rows(lambda q, k, v: (q, v, k)), A1, "k and v are exchanged",
    ),
    "q and k exchanged": Planted(
        MINI, 2, qkv_rows(lambda q, k, v: (k, q, v)), A1, "q and k are exchanged",
    ),
    "q, k, v in another order": Planted(
        "phi2", 2, qkv_rows(lambda q, k, v: (k, v, q)), A1, "in the order k, v, q",
    ),
    "interleave forgotten": Planted(SMALL, 1, whole_qkv(grouped), A1, "still grouped by KV head"),
    "interleave forgotten at TP 2": Planted(
        SMALL, 2, whole_qkv(grouped, (QKV, QKV_BIAS)), A1, "still grouped by KV head",
    ),
    "one head permuted": Planted(MINI, 1, qkv_rows(heads_exchanged(2, 5)), A1, "differ"),
    "q, k, v cut as one block": Planted(
        MEDIUM, 2, whole_qkv(lambda q, k, v, _: torch.cat([q, k, v])), A1, "as one block",
    ),
    "q, k, v of phi2 cut as one block": Planted(
        "phi2", 2, whole_qkv(lambda q, k, v, _: torch.cat([q, k, v])), A1, "as one block",
    ),
    "qkv bias in source order": Planted(
        SMALL, 2, whole_qkv(grouped, (QKV_BIAS,)), A1, "still grouped by KV head",
    ),
    "dense columns of two ranks exchanged": Planted(
        MINI, 2, ranks_exchanged(DENSE), A1, "ranks are exchanged",
    ),
    "dense columns permuted": Planted(SMALL, 1, each(DENSE, permuted_columns), A1, "differ"),
    "dense transposed": Planted("phi2", 1, each(DENSE, torch.t), A1, "transposed"),
    # biases
    "dense bias dropped": Planted(SMALL, 1, each(DENSE_BIAS, torch.zeros_like), A1, "all zero"),
    "dense bias multiplied by the ranks": Planted(
        SMALL, 2, each(DENSE_BIAS, lambda x: x * 2), A1, "multiplied by the number of ranks",
    ),
    "proj bias divided by the ranks": Planted(
        "phi2", 2, each(PROJ_BIAS, lambda x: x / 2), M1, "divided by the number of ranks",
    ),
    "proj bias on the first rank only": Planted(
        SMALL, 2, each(PROJ_BIAS, torch.zeros_like, only=(1,)), M1, "all zero",
    ),
    "lm_head bias missing": Planted("phi2", 1, without("lm_head.bias"), HEAD, "is missing"),
    "lm_head bias zero": Planted(
        "phi2", 2, each("lm_head.bias", torch.zeros_like), HEAD, "all zero",
    ),
    # MLP
    "gate and up exchanged": Planted(MINI, 1, each(FC, halves), M1, "gate and up are exchanged"),
    "gate and up exchanged at TP 2": Planted(
        MEDIUM, 2, each(FC, halves), M1, "gate and up are exchanged",
    ),
    "up and gate cut as one block": Planted(MEDIUM, 2, cut_as_block(FC), M1, "as one block"),
    "gegelu de-interleaved": Planted(
        SMALL, 1, each(FC, lambda x: torch.cat([x[0::2], x[1::2]])), M1, "two halves",
    ),
    "gegelu pairs exchanged": Planted(
        SMALL, 2, each(FC, lambda x: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)), M1,
        "of every pair are exchanged",
    ),
    "one block zeroed": Planted(MEDIUM, 1, each(PROJ, zero_block), M1, "differ"),
    "one block zeroed on one rank": Planted(
        "phi2", 2, each(FC, zero_block, only=(1,)), M1, "differ",
    ),
    "weight scaled": Planted(MINI, 1, each(PROJ, lambda x: x * 0.125), M1, "scaled by 0.125"),
    "gegelu clamp missing": Planted(SMALL, 1, config(gegelu_limit=None), M0, "gegelu_limit"),
    "gegelu limit wrong": Planted(SMALL, 2, config(gegelu_limit=20.0), M0, "gegelu_limit"),
    # layers and norms
    "norm of another layer": Planted(
        MINI, 1,
        exchanged(L1 + "input_layernorm.weight", "transformer.layers.2.input_layernorm.weight"),
        A1, "differ", also=((2, "attention"),),
    ),
    "two norms of a layer exchanged": Planted(
        SMALL, 1, exchanged(L1 + "input_layernorm.bias", L1 + "post_layernorm.bias"), A1, "differ",
        also=(M1,),
    ),
    "norm differs on one rank": Planted(
        MEDIUM, 2, each(L1 + "post_layernorm.weight", lambda x: x * 1.01, only=(1,)), M1,
        "scaled by 1.01",
    ),
    "two layers exchanged": Planted(
        SMALL, 2, layers_exchanged(0, 2), A0, "differ", also=(M0, (2, "attention"), (2, "mlp")),
    ),
    "final norm zeroed": Planted(
        "phi2", 1, each("transformer.ln_f.bias", torch.zeros_like), (None, "final norm"),
        "all zero",
    ),
    # ends
    "vocabulary padding first": Planted(
        MEDIUM, 2, padding_first(["lm_head.weight"]), HEAD, "differ",
    ),
    "tied head untied": Planted(SMALL, 1, ranks(untied), HEAD, "differ"),
    "tied head missing": Planted(SMALL, 1, without("lm_head.weight"), HEAD, "is missing"),
    "embedding rows moved": Planted(
        MINI, 1, each("transformer.vocab_embedding.weight", lambda x: x.roll(1, 0)),
        (None, "embedding"), "differ",
    ),
    # config.json
    "rope base wrong": Planted(
        MEDIUM, 1, config(rotary_base=10000.0), A0, "10000.0; the source calls for 5000.0",
    ),
    "rope base missing": Planted("phi2", 1, config_without("rotary_base"), A0, "rotary_base"),
    "partial factor wrong": Planted("phi2", 1, config(rotary_pct=0.5), A0, "rotary_pct"),
    "long and short factors exchanged": Planted(
        MINI, 1, config_exchange(SHORT, LONG), A0, "exchanged",
    ),
    "long and short factors of small exchanged": Planted(
        SMALL, 2, config_exchange(SHORT, LONG), A0, "exchanged",
    ),
    "mscale wrong": Planted(
        SMALL, 1, config(longrope_long_mscale=1.19), A0, "longrope_long_mscale",
    ),
    "mscale missing": Planted(
        SMALL, 1, config(longrope_long_mscale=1.0), A0, "longrope_long_mscale",
    ),
    "mscale of mini by another length": Planted(
        MINI, 1, config(max_position_embeddings=52 * 64), A0, "max_position_embeddings",
    ),
    "long rope not switched on": Planted(
        MINI, 1, no_long_rope, A0, "longrope_scaling_short_factors",
    ),
    "eps wrong": Planted(MEDIUM, 1, config(norm_epsilon=1e-5), A0, "norm_epsilon"),
    "eps of small wrong": Planted(SMALL, 1, config_without("norm_epsilon"), A0, "norm_epsilon"),
    "dense and sparse layers exchanged": Planted(
        SMALL, 1, config(dense_attention_every_n_layers=3), A1, "dense_attention_every_n_layers",
        also=((2, "attention"),),
    ),
    "sparse layers taken for dense": Planted(
        SMALL, 2, config(dense_attention_every_n_layers=1), A0, "dense_attention_every_n_layers",
    ),
    "stripe of all heads alike": Planted(
        SMALL, 2, config(blocksparse_homo_head_pattern=True), A0, "blocksparse_homo_head_pattern",
    ),
    "muP embedding multiplier missing": Planted(
        SMALL, 1, config(mup_embedding_multiplier=0.0), (None, "embedding"),
        "mup_embedding_multiplier",
    ),
    "muP width multiplier missing": Planted(
        SMALL, 1, config_without("mup_width_multiplier"), HEAD, "mup_width_multiplier",
    ),
    "activation wrong": Planted(SMALL, 1, config(hidden_act="swiglu"), M0, "hidden_act"),
    # rounding: what only bytes show
    "cast by truncation": Planted(
        "phi2", 1, each(FC, truncated), None, "differ", numeric=False, dtype="bfloat16",
    ),
    "padding not zero": Planted(
        "phi2", 2, each("lm_head.weight", lambda x: torch.cat([x[:-1], x[:1]]), only=(1,)), None,
        "lm_head", numeric=False,
    ),
}  # fmt: skip
