"""A plugin as a stranger might write it, on three bases, with one mistake planted at a time.

Each mistake is a function that makes the steps to put on top of the base, and what the conformance
tests must say about it: words of the message, beside the file and line of the rule.
"""

import inspect
from dataclasses import dataclass, replace

from phireg_plugins.phi2 import FAMILY as PHI2
from phireg_plugins.phi3_mini import FAMILY as MINI
from phireg_plugins.phi3_small import FAMILY as SMALL

from phireg.api import (
    COLUMN,
    COPY,
    ROW,
    Axis,
    FieldTable,
    Linear,
    Norm,
    Rules,
    Table,
    columns,
    const,
    field,
    fuse,
    hookimpl,
    ignore,
    order,
    pad,
    parts,
    positive,
    src,
    ungroup,
)
from phireg.layout.spans import Part, Span

PHI2_TINY = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 72,
    "vocab_size": 99, "max_position_embeddings": 128, "partial_rotary_factor": 0.5,
    "rope_theta": 5000.0, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
MINI_TINY = {
    "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3,
    "intermediate_size": 40, "vocab_size": 97, "max_position_embeddings": 128, "pad_token_id": 0,
    "rms_norm_eps": 1e-2, "rope_theta": 5000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
SMALL_TINY = {
    "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3,
    "ff_intermediate_size": 40, "vocab_size": 97, "max_position_embeddings": 256,
    "gegelu_limit": 0.5, "gegelu_pad_to_256": False, "rope_embedding_base": 5000.0,
    "layer_norm_epsilon": 1e-2, "hidden_act": "gegelu", "tie_word_embeddings": True,
    "blocksparse_block_size": 4, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 5,
    "dense_attention_every_n_layers": 2, "mup_width_multiplier": 3.0,
    "mup_embedding_multiplier": 7.0,
}  # fmt: skip
TINY = {
    "phi2": PHI2_TINY,
    "mini": MINI_TINY,
    "tied": {**MINI_TINY, "tie_word_embeddings": True},
    "small": SMALL_TINY,
}
BASES = {"phi2": PHI2, "mini": MINI, "tied": MINI, "small": SMALL}
H, KV, SIZE, HIDDEN, INNER, VOCAB, LAYERS = 8, 4, 6, 48, 40, 97, 3
Q, K = H * SIZE, KV * SIZE


@dataclass(frozen=True)
class Mistake:
    """What is planted, what must be said of it, and the lines of this file that must be named."""

    base: str
    step: object
    says: tuple[str, ...]
    lines: range

    def family(self):
        return BASES[self.base].derive("acme", self.step)


MISTAKES = {}


def lines_of(function):
    source, start = inspect.getsourcelines(function)
    return range(start, start + len(source))


def mistake(base, *says, omission=False):
    """Plant a function that amends the rules; the place of what it leaves out is the hook's."""

    def planted(make):
        class Weights:
            @hookimpl(wrapper=True)
            def phireg_weight_rules(self):
                return make((yield))

        place = Weights.phireg_weight_rules if omission else make
        MISTAKES[make.__name__] = Mistake(base, Weights(), says, lines_of(place))
        return make

    return planted


def wrong_fields(base, *says, omission=False):
    """Plant a function that amends the field table; as for rules, the hook stands for omissions."""

    def planted(make):
        class Fields:
            @hookimpl(wrapper=True)
            def phireg_config_fields(self):
                return make((yield))

        place = Fields.phireg_config_fields if omission else make
        MISTAKES[make.__name__] = Mistake(base, Fields(), says, lines_of(place))
        return make

    return planted


def wrong_quantization(base, *says):
    """Plant a function that amends the quantization rules, whose place is the hook's."""

    def planted(make):
        class Quantization:
            @hookimpl(wrapper=True)
            def phireg_quant_rules(self):
                return make((yield))

        place = lines_of(Quantization.phireg_quant_rules)
        MISTAKES[make.__name__] = Mistake(base, Quantization(), says, place)
        return make

    return planted


def target(i, name):
    return f"transformer.layers.{i}.{name}"


def source(i, name):
    return f"model.layers.{i}.{name}"


def every(make):
    """The rules that a function makes for all layers."""
    return [make(i) for i in range(LAYERS)]


def without(rules, *targets):
    return Rules(*(rule for t, rule in rules.items() if t not in targets), drop=rules.drop)


def gate_up(i):
    return parts(src(source(i, "mlp.gate_up_proj"), 2 * INNER), gate=INNER, up=INNER)


def qkv(i):
    return parts(src(source(i, "self_attn.qkv_proj"), Q + 2 * K), q=Q, k=K, v=K, unit=SIZE)


# --- rows in another order -------------------------------------------------------------------


@mistake("mini", "gate and up are exchanged", "row 0 of transformer.layers.0.mlp.fc.weight")
def halves_not_swapped(rules):
    """As the source has them: gate, up."""
    return rules.replace(*every(lambda i: Linear(target(i, "mlp.fc"), gate_up(i), HIDDEN, COLUMN)))


@mistake("mini", "k and v are exchanged", "row 48 of transformer.layers.0.attention.qkv.weight")
def k_and_v_exchanged(rules):
    def rule(i):
        axis = order(qkv(i), "q", "v", "k")
        return Linear(target(i, "attention.qkv"), axis, HIDDEN, COLUMN)

    return rules.replace(*every(rule))


@mistake("phi2", "k and v are exchanged", "self_attn.k_proj")
def k_and_v_fused_in_the_wrong_order(rules):
    def rule(i):
        one = {p: src(source(i, f"self_attn.{p}_proj"), 64) for p in "qvk"}
        return Linear(target(i, "attention.qkv"), fuse(**one, unit=16), 64, COLUMN, bias=True)

    return rules.replace(*every(rule))


@mistake("small", "still grouped by KV head", "row 12 of transformer.layers.0.attention.qkv")
def de_interleaving_forgotten(rules):
    def rule(i):
        axis = src(source(i, "self_attn.query_key_value"), Q + 2 * K)
        named = parts(axis, q=Q, k=K, v=K, unit=SIZE)
        return Linear(target(i, "attention.qkv"), named, HIDDEN, COLUMN, bias=True)

    return rules.replace(*every(rule))


@mistake("small", "de-interleaved into two halves", "row 1 of transformer.layers.0.mlp.fc.weight")
def pairs_pulled_apart(rules):
    def rule(i):
        up = src(source(i, "mlp.up_proj"), 2 * INNER)
        halves = ungroup(up, groups=INNER, unit=1, gelu=1, linear=1)
        return Linear(target(i, "mlp.fc"), halves, HIDDEN, COLUMN, bias=True)

    return rules.replace(*every(rule))


@mistake("mini", "query head 1 and query head 2 are exchanged", "row 6 of transformer.layers.1")
def one_head_permuted(rules):
    name = source(1, "self_attn.qkv_proj")
    heads = [Span(name, n * SIZE, SIZE) for n in range(H)]
    heads[1], heads[2] = heads[2], heads[1]
    axis = qkv(1)
    axis = replace(axis, parts=(replace(axis.parts[0], spans=tuple(heads)), *axis.parts[1:]))
    return rules.replace(Linear(target(1, "attention.qkv"), axis, HIDDEN, COLUMN))


@mistake("mini", "the columns of heads 0 and 2 are exchanged", "column 0 of")
def columns_of_two_heads_exchanged(rules):
    cols = columns(Q, unit=SIZE)
    spans = [Span("", n * SIZE, SIZE) for n in (2, 1, 0)] + [Span("", 3 * SIZE, Q - 3 * SIZE)]
    cols = replace(cols, parts=(replace(cols.parts[0], spans=tuple(spans)),))
    rows = src(source(0, "self_attn.o_proj"), HIDDEN)
    return rules.replace(Linear(target(0, "attention.dense"), rows, cols, ROW))


# --- rows of something else ------------------------------------------------------------------


@mistake("mini", "it reads model.layers.0.post_attention_layernorm, not", "input_layernorm")
def norms_exchanged(rules):
    def rule(i, name, other):
        return Norm(target(i, name), src(source(i, other), HIDDEN))

    return rules.replace(
        *every(lambda i: rule(i, "input_layernorm", "post_attention_layernorm")),
        *every(lambda i: rule(i, "post_layernorm", "input_layernorm")),
    )


@mistake("small", "it reads model.layers.1.post_attention_layernorm, not model.final_layernorm")
def final_norm_from_a_layer(rules):
    return rules.replace(
        Norm("transformer.ln_f", src(source(1, "post_attention_layernorm"), HIDDEN), bias=True),
        Norm(target(1, "post_layernorm"), src("model.final_layernorm", HIDDEN), bias=True),
    )


@mistake("phi2", "transformer.layers.0.mlp.proj", "row 0 of transformer.layers.0.mlp.proj.bias")
def biases_of_two_modules_exchanged(rules):
    def rules_of(i):
        dense, proj = (src(source(i, name), 64) for name in ("self_attn.dense", "mlp.fc2"))
        cols = columns(64, unit=16)
        return (
            Linear(target(i, "attention.dense"), dense, cols, ROW, bias=proj),
            Linear(target(i, "mlp.proj"), proj, 72, ROW, bias=dense),
        )

    return rules.replace(*(rule for pair in every(rules_of) for rule in pair))


@mistake("mini", "it reads model.layers.1.mlp.down_proj, not model.layers.0.mlp.down_proj")
def off_by_one_layer(rules):
    def rule(i):
        rows = src(source((i + 1) % LAYERS, "mlp.down_proj"), HIDDEN)
        return Linear(target(i, "mlp.proj"), rows, INNER, ROW)

    return rules.replace(*every(rule))


@mistake("mini", "embedding", "it reads lm_head, not model.embed_tokens")
def embedding_and_head_exchanged(rules):
    return rules.replace(
        Table("transformer.vocab_embedding", src("lm_head", VOCAB), HIDDEN),
        Linear("lm_head", pad(src("model.embed_tokens", VOCAB)), HIDDEN, COLUMN),
    )


# --- missing and surplus ---------------------------------------------------------------------


@mistake("tied", "lm_head.weight: the reader requires it, and no rule makes it", omission=True)
def tied_head_forgotten(rules):
    return without(rules, "lm_head")


@mistake("tied", "model.embed_tokens are used twice")
def tie_not_said(rules):
    head = pad(src("model.embed_tokens", VOCAB))
    return rules.replace(Linear("lm_head", head, HIDDEN, COLUMN))


@mistake("small", "mlp.down_proj.bias", "no rule maps it")
def bias_forgotten(rules):
    def rule(i):
        rows = src(source(i, "mlp.down_proj"), HIDDEN)
        return Linear(target(i, "mlp.proj"), rows, INNER, ROW)

    return rules.replace(*every(rule))


@mistake("mini", "model.layers.2.post_attention_layernorm.weight", "no rule maps it", omission=True)
def last_layers_norm_dropped(rules):
    return without(rules, target(2, "post_layernorm"))


@mistake("mini", "rows 72 to 96 of model.layers.{0..2}", "used nowhere")
def v_taken_from_k(rules):
    def rule(i):
        name = source(i, "self_attn.qkv_proj")
        q, k, _ = qkv(i).parts
        axis = Axis((q, k, replace(k, name="v")), ((name, Q + 2 * K),))
        return Linear(target(i, "attention.qkv"), axis, HIDDEN, COLUMN)

    return rules.replace(*every(rule))


# --- ranks -----------------------------------------------------------------------------------


@mistake("mini", "TP 2, all ranks together: row 24 of transformer.layers.0.attention.qkv.weight")
def parts_not_named(rules):
    """As one block: the first rank gets all of q, the second all of k and v."""

    def rule(i):
        axis = src(source(i, "self_attn.qkv_proj"), Q + 2 * K, unit=SIZE)
        return Linear(target(i, "attention.qkv"), axis, HIDDEN, COLUMN)

    return rules.replace(*every(rule))


@mistake("mini", "mlp.proj.weight: would be", "reader expects [48, 20]")
def wrong_policy(rules):
    def rule(i):
        rows = src(source(i, "mlp.down_proj"), HIDDEN)
        return Linear(target(i, "mlp.proj"), rows, INNER, COLUMN)

    return rules.replace(*every(rule))


@mistake("mini", "mlp.fc.weight: would be", "reader expects [40, 48]")
def copied_instead_of_cut(rules):
    def rule(i):
        return Linear(target(i, "mlp.fc"), order(gate_up(i), "up", "gate"), HIDDEN, COPY)

    return rules.replace(*every(rule))


@mistake("mini", "part 'rows': 97 rows cannot be divided over 2 ranks")
def padding_forgotten(rules):
    return rules.replace(Linear("lm_head", src("lm_head", VOCAB), HIDDEN, COLUMN))


@mistake("mini", "lm_head.weight", "would be [98, 48]; the reader expects [97, 48]")
def padding_in_front(rules):
    axis = Axis((Part("rows", (Span(None, 0, 1), Span("lm_head", 0, VOCAB))),), (("lm_head", 97),))
    return rules.replace(Linear("lm_head", axis, HIDDEN, COLUMN))


@mistake("mini", "TP 2, all ranks together: row 24 of lm_head.weight came from row 48")
def head_divided_in_two_parts(rules):
    """Two parts are divided one by one, so each rank gets half of either."""
    first, last = (Span("lm_head", 0, 48), Span("lm_head", 48, 49))
    one, two = Part("a", (first,), padded=True), Part("b", (last,), padded=True)
    return rules.replace(Linear("lm_head", Axis((one, two), (("lm_head", 97),)), HIDDEN, COLUMN))


# --- config ----------------------------------------------------------------------------------


@wrong_fields(
    "mini", "rotary_base is 10000.0", "if it is 5000.0, which config.json has as rope_theta"
)
def rope_base_ignored(table):
    entries = (entry for entry in table if entry.to != ("rotary_base",))
    return FieldTable(
        *entries, const("rotary_base", 10000.0), ignore("rope_theta", why="taken for a default")
    )


@wrong_fields(
    "mini", "norm_epsilon is 1e-05", "if it is 0.01, which config.json has as rms_norm_eps"
)
def wrong_epsilon(table):
    return table.replace(
        const("norm_epsilon", 1e-5), ignore("rms_norm_eps", why="taken for a default")
    )


@wrong_fields("small", "'hidden_act = 'swiglu''", "hidden_act is 'swiglu'", "if it is 'gegelu'")
def wrong_activation(table):
    return table.replace(const("hidden_act", "swiglu"))


@wrong_fields("small", "gegelu_limit is 7.0", "0.5, which config.json has as gegelu_limit")
def limit_from_another_key(table):
    return table.replace(field("mup_embedding_multiplier", to="gegelu_limit", kind=positive))


@wrong_fields("mini", "rope_theta: no entry reads it", omission=True)
def key_not_read(table):
    return table.replace(const("rotary_base", 5000.0))


@wrong_fields(
    "mini",
    "hidden_act: the reader of Phi3ForCausalLM needs it, and no entry produces it",
    omission=True,
)
def required_key_not_made(table):
    kept = (entry for entry in table if entry.to != ("hidden_act",))
    return FieldTable(*kept, ignore("hidden_act", why="taken for training"))


# --- quantization ----------------------------------------------------------------------------


@wrong_quantization("mini", "the quantization rules name it, and no weight rule makes it")
def linear_misspelt(rules):
    return replace(rules, linears=(*rules.linears, "transformer.layers.0.attention.qvk"))


@wrong_quantization("mini", "lm_head", "has padded rows, which have no scale")
def head_quantized(rules):
    return replace(rules, linears=(*rules.linears, "lm_head"))


@wrong_quantization("mini", "input_layernorm", "has no input features")
def norm_quantized(rules):
    return replace(rules, linears=(*rules.linears, "transformer.layers.0.input_layernorm"))
