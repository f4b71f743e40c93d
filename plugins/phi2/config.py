"""phi-2's config fields. Older layouts spell them in GPT-2's way (``n_embd``, ``n_layer``)."""

import math

from phireg.api import (
    BOOKKEEPING,
    CONSTANTS,
    ConfigError,
    Fields,
    FieldTable,
    HFConfig,
    Severity,
    boolean,
    check,
    const,
    derive,
    dimensions,
    field,
    grouped_heads,
    hookimpl,
    ignore,
    in_rope,
    integer,
    positive,
    refuse,
    rotary_base,
    rotary_dim,
    same_as,
    supported_rope,
    text,
)

TANH_GELU = dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_new")
"""One function under three names; ``gelu`` itself is the erf form, which TensorRT-LLM lacks."""


def rotary_pct(fields: Fields, hf: HFConfig) -> float:
    """The rotated share of a head, stated as a share or as a number of dimensions.

    A share that is not stated is one half, transformers' default for phi. The older configs (those
    that say ``n_embd``) state dimensions, 32 if absent, and mean the whole head by too many.
    """
    size = fields["head_size"]
    keys = (*in_rope("partial_rotary_factor"), "partial_rotary_factor")
    shares = {key: hf.get(key) for key in keys if hf.has(key)}
    for key, value in shares.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
            raise ConfigError(f"{key} is {value!r}: expected a number above 0, at most 1")
    rotated = {key: int(size * value) for key, value in shares.items()}
    stated = hf.get("rotary_dim")
    if stated is None and not shares and hf.has("n_embd"):
        stated = 32
    if stated is not None:
        try:
            rotated["rotary_dim"] = min(integer()(stated), size)
        except ValueError as problem:
            raise ConfigError(f"rotary_dim is {stated!r}: {problem}") from None
    if len(set(rotated.values())) > 1:
        listed = ", ".join(f"{key}: {count}" for key, count in rotated.items())
        raise ConfigError(f"the numbers of rotated dimensions disagree ({listed})")
    if shares or not rotated:
        return float(next(iter(shares.values()), 0.5))
    share = rotated["rotary_dim"] / size
    # Readers compute int(head_size * share), which must not fall below the number it came from.
    return share if int(size * share) == rotated["rotary_dim"] else math.nextafter(share, 2)


def no_grouping(fields: Fields, _: HFConfig) -> str | None:
    """TensorRT-LLM's phi model passes no number of KV heads: its qkv has 3 x hidden rows."""
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads == kv_heads:
        return None
    return f"is {kv_heads} for {heads} heads; TensorRT-LLM's phi-2 has no grouped KV heads"


def fixed_epsilon(fields: Fields, _: HFConfig) -> str | None:
    """TensorRT-LLM's phi model never passes an epsilon to its LayerNorm."""
    found = fields["norm_epsilon"]
    return None if found == 1e-5 else f"is {found}, but TensorRT-LLM computes phi-2 with 1e-05"


@hookimpl
def phireg_config_fields() -> FieldTable:
    """How phi-2's config.json becomes the checkpoint's."""
    return FieldTable(
        const("architecture", "PhiForCausalLM"),
        *dimensions(
            hidden_size="n_embd",
            num_hidden_layers="n_layer",
            num_attention_heads="n_head",
            max_position_embeddings="n_positions",
        ),
        *grouped_heads("n_head_kv"),
        check("num_key_value_heads", no_grouping),
        field(
            "intermediate_size",
            "n_inner",
            kind=integer(1, 2**20),
            default=lambda fields: 4 * fields["hidden_size"],
        ),
        field("hidden_act", "activation_function", kind=text, via=TANH_GELU),
        field(
            "layer_norm_eps", "layer_norm_epsilon", to="norm_epsilon", kind=positive, default=1e-5
        ),
        check("layer_norm_eps", fixed_epsilon, severity=Severity.WARNING),
        supported_rope("default"),
        const("position_embedding_type", "rope_gpt_neox"),
        rotary_base("rope_theta", default=10000.0),
        derive("rotary_pct", rotary_pct, "partial_rotary_factor, or rotary_dim / head_size"),
        same_as("rotary_pct", to="partial_rotary_factor"),
        derive("rotary_embedding_dim", rotary_dim, "int(head_size * rotary_pct)"),
        field("tie_word_embeddings", kind=boolean, default=False),
        refuse("qk_layernorm", unless=[False], why="TensorRT-LLM's phi-2 has no q/k norms"),
        *CONSTANTS,
        *BOOKKEEPING,
        refuse("architecture.block_cls", unless=["parallel"], why="phi's blocks are parallel"),
        refuse("embd_layer", unless=["default"], why="phi has a plain embedding"),
        ignore("architecture", why="names the sequential layout's building blocks"),
        ignore("flash_attn", "flash_rotary", "fused_dense", why="chooses the source's kernels"),
        ignore("phyagi_version", why="tells how the file was made"),
        ignore("pad_vocab_size_multiple", why="vocab_size is padded already"),
        ignore("rotary_dim", why="read with rotary_pct"),
    )
