"""A third-party plugin on three bases, with one mistake planted at a time.

Each mistake is a function that amends the result of one hook of the base, with parts of the message
that the conformance tests must give: the tensor or key, and where it came from.
"""

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

from phireg_plugins.phi2 import FAMILY as PHI2
from phireg_plugins.phi3_mini import FAMILY as MINI
from phireg_plugins.phi3_small import FAMILY as SMALL

import phireg.api as ph
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
    """A variant of a base with one mistake, and parts of a message about it."""

    base: str
    step: object
    message: tuple[str, ...]

    def family(self):
        return BASES[self.base].derive("acme", self.step)


MISTAKES = {}


def planting(hook):
    """A decorator for functions that amend the result of ``hook`` wrongly."""

    def planted(base, *message):
        def plant(amend):
            @ph.hookimpl(wrapper=True)
            def wrapper():
                return amend((yield))

            step = SimpleNamespace(**{hook: wrapper})
            MISTAKES[amend.__name__] = Mistake(base, step, message)
            return amend

        return plant

    return planted


wrong_rules = planting("phireg_weight_rules")
wrong_fields = planting("phireg_config_fields")
wrong_quantization = planting("phireg_quant_rules")


def target(i, name):
    return f"transformer.layers.{i}.{name}"


def source(i, name):
    return f"model.layers.{i}.{name}"


def every(make):
    """The rules that a function makes for all layers."""
    return [make(i) for i in range(LAYERS)]


def wrong_layers(base, *message):
    """A decorator for functions that make a wrong rule for one layer; it replaces all layers'."""

    def planted(rule):
        @wrong_rules(base, *message)
        @functools.wraps(rule)
        def amend(rules):
            return rules.replace(*every(rule))

        return amend

    return planted


def without(rules, *targets):
    return ph.Rules(*(rule for t, rule in rules.items() if t not in targets), drop=rules.drop)


def gate_up(i):
    return ph.parts(ph.src(source(i, "mlp.gate_up_proj"), 2 * INNER), gate=INNER, up=INNER)


def qkv(i):
    return ph.parts(ph.src(source(i, "self_attn.qkv_proj"), Q + 2 * K), q=Q, k=K, v=K, unit=SIZE)


# --- rows in another order -------------------------------------------------------------------


@wrong_layers(
    "mini",
    "row 0 of transformer.layers.0.mlp.fc.weight came from row 0",
    "expected row 40",
    "acme.py:",
)
def halves_not_swapped(i):
    """As the source has them: gate, up."""
    return ph.Linear(target(i, "mlp.fc"), gate_up(i), HIDDEN, ph.COLUMN)


@wrong_layers(
    "mini", "row 48 of transformer.layers.0.attention.qkv.weight came from row 72", "acme.py:"
)
def k_and_v_exchanged(i):
    axis = ph.order(qkv(i), "q", "v", "k")
    return ph.Linear(target(i, "attention.qkv"), axis, HIDDEN, ph.COLUMN)


@wrong_layers("phi2", "row 64 of transformer.layers.0.attention.qkv.bias", "self_attn.k_proj")
def k_and_v_fused_in_the_wrong_order(i):
    linears = {p: ph.src(source(i, f"self_attn.{p}_proj"), 64) for p in "qvk"}
    return ph.Linear(
        target(i, "attention.qkv"), ph.fuse(**linears, unit=16), 64, ph.COLUMN, bias=True
    )


@wrong_layers("small", "row 12 of transformer.layers.0.attention.qkv.weight", "expected row 24")
def de_interleaving_forgotten(i):
    axis = ph.src(source(i, "self_attn.query_key_value"), Q + 2 * K)
    named = ph.parts(axis, q=Q, k=K, v=K, unit=SIZE)
    return ph.Linear(target(i, "attention.qkv"), named, HIDDEN, ph.COLUMN, bias=True)


@wrong_layers(
    "small", "row 1 of transformer.layers.0.mlp.fc.weight came from row 2", "expected row 1"
)
def pairs_pulled_apart(i):
    up = ph.src(source(i, "mlp.up_proj"), 2 * INNER)
    halves = ph.ungroup(up, groups=INNER, unit=1, gelu=1, linear=1)
    return ph.Linear(target(i, "mlp.fc"), halves, HIDDEN, ph.COLUMN, bias=True)


@wrong_rules("mini", "row 6 of transformer.layers.1.attention.qkv.weight", "expected row 6")
def one_head_permuted(rules):
    name = source(1, "self_attn.qkv_proj")
    heads = [Span(name, n * SIZE, SIZE) for n in range(H)]
    heads[1], heads[2] = heads[2], heads[1]
    axis = qkv(1)
    axis = replace(axis, parts=(replace(axis.parts[0], spans=tuple(heads)), *axis.parts[1:]))
    return rules.replace(ph.Linear(target(1, "attention.qkv"), axis, HIDDEN, ph.COLUMN))


@wrong_rules("mini", "column 0 of transformer.layers.0.attention.dense.weight came from column 12")
def columns_of_two_heads_exchanged(rules):
    cols = ph.columns(Q, unit=SIZE)
    spans = [Span("", n * SIZE, SIZE) for n in (2, 1, 0)] + [Span("", 3 * SIZE, Q - 3 * SIZE)]
    cols = replace(cols, parts=(replace(cols.parts[0], spans=tuple(spans)),))
    rows = ph.src(source(0, "self_attn.o_proj"), HIDDEN)
    return rules.replace(ph.Linear(target(0, "attention.dense"), rows, cols, ph.ROW))


# --- rows of something else ------------------------------------------------------------------


@wrong_rules(
    "mini",
    "row 0 of transformer.layers.0.input_layernorm.weight",
    "layers.0.post_attention_layernorm",
)
def norms_exchanged(rules):
    def rule(i, name, other):
        return ph.Norm(target(i, name), ph.src(source(i, other), HIDDEN))

    return rules.replace(
        *every(lambda i: rule(i, "input_layernorm", "post_attention_layernorm")),
        *every(lambda i: rule(i, "post_layernorm", "input_layernorm")),
    )


@wrong_rules("small", "row 0 of transformer.ln_f.weight", "model.layers.1.post_attention_layernorm")
def final_norm_from_a_layer(rules):
    return rules.replace(
        ph.Norm(
            "transformer.ln_f", ph.src(source(1, "post_attention_layernorm"), HIDDEN), bias=True
        ),
        ph.Norm(target(1, "post_layernorm"), ph.src("model.final_layernorm", HIDDEN), bias=True),
    )


@wrong_rules("phi2", "row 0 of transformer.layers.0.mlp.proj.bias", "self_attn.dense.bias")
def biases_of_two_modules_exchanged(rules):
    def rules_of(i):
        dense, proj = (ph.src(source(i, name), 64) for name in ("self_attn.dense", "mlp.fc2"))
        cols = ph.columns(64, unit=16)
        return (
            ph.Linear(target(i, "attention.dense"), dense, cols, ph.ROW, bias=proj),
            ph.Linear(target(i, "mlp.proj"), proj, 72, ph.ROW, bias=dense),
        )

    return rules.replace(*(rule for pair in every(rules_of) for rule in pair))


@wrong_layers(
    "mini", "row 0 of transformer.layers.0.mlp.proj.weight", "model.layers.1.mlp.down_proj"
)
def off_by_one_layer(i):
    rows = ph.src(source((i + 1) % LAYERS, "mlp.down_proj"), HIDDEN)
    return ph.Linear(target(i, "mlp.proj"), rows, INNER, ph.ROW)


@wrong_rules("mini", "row 0 of transformer.vocab_embedding.weight came from row 0 of lm_head")
def embedding_and_head_exchanged(rules):
    return rules.replace(
        ph.Table("transformer.vocab_embedding", ph.src("lm_head", VOCAB), HIDDEN),
        ph.Linear("lm_head", ph.pad(ph.src("model.embed_tokens", VOCAB)), HIDDEN, ph.COLUMN),
    )


# --- missing and surplus ---------------------------------------------------------------------


@wrong_rules("tied", "schema    lm_head.weight")
def tied_head_forgotten(rules):
    return without(rules, "lm_head")


@wrong_rules("tied", "model.embed_tokens", "twice", "lm_head")
def tie_not_said(rules):
    head = ph.pad(ph.src("model.embed_tokens", VOCAB))
    return rules.replace(ph.Linear("lm_head", head, HIDDEN, ph.COLUMN))


@wrong_layers("small", "unmapped  model.layers.{0..2}.mlp.down_proj.bias")
def bias_forgotten(i):
    rows = ph.src(source(i, "mlp.down_proj"), HIDDEN)
    return ph.Linear(target(i, "mlp.proj"), rows, INNER, ph.ROW)


@wrong_rules("mini", "unmapped  model.layers.2.post_attention_layernorm.weight")
def last_layers_norm_dropped(rules):
    return without(rules, target(2, "post_layernorm"))


@wrong_layers("mini", "rows 72 to 96 of model.layers.{0..2}.self_attn.qkv_proj are used nowhere")
def v_taken_from_k(i):
    name = source(i, "self_attn.qkv_proj")
    q, k, _ = qkv(i).parts
    axis = ph.Axis((q, k, replace(k, name="v")), ((name, Q + 2 * K),))
    return ph.Linear(target(i, "attention.qkv"), axis, HIDDEN, ph.COLUMN)


# --- ranks -----------------------------------------------------------------------------------


@wrong_layers(
    "mini",
    "TP 2",
    "row 24 of transformer.layers.0.attention.qkv.weight came from row 48",
    "acme.py:",
)
def parts_not_named(i):
    """As one block: the first rank gets all of q, the second all of k and v."""
    axis = ph.src(source(i, "self_attn.qkv_proj"), Q + 2 * K, unit=SIZE)
    return ph.Linear(target(i, "attention.qkv"), axis, HIDDEN, ph.COLUMN)


@wrong_layers("mini", "mlp.proj.weight", "[24, 40]", "[48, 20]")
def wrong_policy(i):
    rows = ph.src(source(i, "mlp.down_proj"), HIDDEN)
    return ph.Linear(target(i, "mlp.proj"), rows, INNER, ph.COLUMN)


@wrong_layers("mini", "mlp.fc.weight", "[80, 48]", "[40, 48]")
def copied_instead_of_cut(i):
    return ph.Linear(target(i, "mlp.fc"), ph.order(gate_up(i), "up", "gate"), HIDDEN, ph.COPY)


@wrong_rules("mini", "sharding  lm_head", "acme.py:")
def padding_forgotten(rules):
    return rules.replace(ph.Linear("lm_head", ph.src("lm_head", VOCAB), HIDDEN, ph.COLUMN))


@wrong_rules("mini", "lm_head.weight", "[98, 48]", "[97, 48]")
def padding_in_front(rules):
    axis = ph.Axis(
        (Part("rows", (Span(None, 0, 1), Span("lm_head", 0, VOCAB))),), (("lm_head", 97),)
    )
    return rules.replace(ph.Linear("lm_head", axis, HIDDEN, ph.COLUMN))


@wrong_rules("mini", "TP 2", "row 24 of lm_head.weight came from row 48", "acme.py:")
def head_divided_in_two_parts(rules):
    """Two parts are divided one by one, so each rank gets half of either."""
    first, last = (Span("lm_head", 0, 48), Span("lm_head", 48, 49))
    head, tail = Part("a", (first,), padded=True), Part("b", (last,), padded=True)
    return rules.replace(
        ph.Linear("lm_head", ph.Axis((head, tail), (("lm_head", 97),)), HIDDEN, ph.COLUMN)
    )


# --- config ----------------------------------------------------------------------------------


@wrong_fields("mini", "layer 0 attention", "rotary_base is 10000.0, expected 5000.0", "acme.py:")
def rope_base_ignored(table):
    entries = (entry for entry in table if entry.to != ("rotary_base",))
    return ph.FieldTable(
        *entries,
        ph.const("rotary_base", 10000.0),
        ph.ignore("rope_theta", why="taken for a default"),
    )


@wrong_fields("mini", "layer 0 attention", "norm_epsilon is 1e-05, expected 0.01")
def wrong_epsilon(table):
    return table.replace(
        ph.const("norm_epsilon", 1e-5), ph.ignore("rms_norm_eps", why="taken for a default")
    )


@wrong_fields("small", "layer 0 mlp", "hidden_act is 'swiglu', expected 'gegelu'")
def wrong_activation(table):
    return table.replace(ph.const("hidden_act", "swiglu"))


@wrong_fields("small", "layer 0 mlp", "gegelu_limit is 7.0, expected 0.5")
def limit_from_another_key(table):
    return table.replace(ph.field("mup_embedding_multiplier", to="gegelu_limit", kind=ph.positive))


@wrong_fields("mini", "rope_theta: no entry reads it")
def key_not_read(table):
    return table.replace(ph.const("rotary_base", 5000.0))


@wrong_fields("mini", "hidden_act", "Phi3ForCausalLM")
def required_key_not_made(table):
    kept = (entry for entry in table if entry.to != ("hidden_act",))
    return ph.FieldTable(*kept, ph.ignore("hidden_act", why="taken for training"))


# --- quantization ----------------------------------------------------------------------------


@wrong_quantization("mini", "quant     transformer.layers.0.attention.qvk")
def linear_misspelled(rules):
    return replace(rules, linears=(*rules.linears, "transformer.layers.0.attention.qvk"))


@wrong_quantization("mini", "quant     lm_head")
def head_quantized(rules):
    return replace(rules, linears=(*rules.linears, "lm_head"))


@wrong_quantization("mini", "quant     transformer.layers.0.input_layernorm")
def norm_quantized(rules):
    return replace(rules, linears=(*rules.linears, "transformer.layers.0.input_layernorm"))
