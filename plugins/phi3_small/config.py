"""Phi-3-small's config fields. An absent key means the source class's default, given here."""

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
    is_long_rope,
    long_rope_factors,
    long_rope_scale,
    number,
    positive,
    refuse,
    rotary_base,
    rotary_dim,
    same_as,
    supported_rope,
    text,
    when,
)


def intermediate_size(fields: Fields, hf: HFConfig) -> int:
    """ff_intermediate_size; if null, ff_dim_multiplier * (hidden_size // 3) * 2 rounded up to 256.

    Absent is not null: it means the class's 14336, whatever the multiplier.
    """
    stated, multiplier = hf.get("ff_intermediate_size"), hf.get("ff_dim_multiplier")
    if stated is None and not hf.is_null("ff_intermediate_size"):
        stated = 14336
    if stated is None and multiplier is None:
        raise ConfigError("neither ff_intermediate_size nor ff_dim_multiplier is given")
    kind = integer(1, 2**20)
    try:
        if stated is not None:
            return int(kind(stated))
        size = int(kind(int(positive(multiplier) * (fields["hidden_size"] // 3) * 2)))
    except ValueError as problem:
        key = "ff_dim_multiplier" if stated is None else "ff_intermediate_size"
        raise ConfigError(f"{key}: {problem}") from None
    padded = hf.get("gegelu_pad_to_256")
    return -(-size // 256) * 256 if padded is None or padded else size


def dense_every(fields: Fields, hf: HFConfig) -> int:
    """Layer i is dense iff (i + 1) is a multiple of this; a period no layer reaches means none.

    The source says "none" with 0 or null, which the reader cannot take.
    """
    value = hf.get("dense_attention_every_n_layers")
    if value == 0 or hf.is_null("dense_attention_every_n_layers"):
        return int(fields["num_hidden_layers"]) + 1
    try:
        return 2 if value is None else int(integer()(value))
    except ValueError as problem:
        raise ConfigError(str(problem)) from None


def mscale(name: str, fields: Fields, hf: HFConfig) -> float | None:
    """The stated factor on cos and sin, or None if there is none or it is not above zero."""
    for key in in_rope(f"{name}_mscale"):
        stated = hf.get(key)
        if stated is not None:
            try:
                return number(stated) if number(stated) > 0 else None
            except ValueError as problem:
                raise ConfigError(f"{key}: {problem}") from None
    return None


def short_mscale(fields: Fields, hf: HFConfig) -> float:
    """The source's own code falls back to 1 for short sequences (unlike Phi-3-mini's)."""
    return mscale("short", fields, hf) or 1.0


def long_mscale(fields: Fields, hf: HFConfig) -> float:
    """The source's own code falls back to the formula for long ones."""
    lengths = fields["max_position_embeddings"], fields["original_max_position_embeddings"]
    return mscale("long", fields, hf) or long_rope_scale(*lengths)


def position_scale(_: Fields, hf: HFConfig) -> str | None:
    """Only plain rope uses rope_position_scale, and the reader has no such factor."""
    scale = hf.get("rope_position_scale")
    if scale in (None, 1, 1.0) or is_long_rope(hf):
        return None
    return f"is {scale!r}; TensorRT-LLM does not scale positions"


def fixed_epsilon(fields: Fields, _: HFConfig) -> str | None:
    """Until 0.14 TensorRT-LLM's model did not pass the epsilon to its LayerNorm."""
    found = fields["norm_epsilon"]
    return None if found == 1e-5 else f"is {found}; TensorRT-LLM before 0.14 computes with 1e-05"


def known_head_size(fields: Fields, _: HFConfig) -> str | None:
    """TensorRT-LLM's decoding kernels for block-sparse attention exist for one head size."""
    size = fields["head_size"]
    return None if size == 128 else f"is {size}; engines have block-sparse kernels for 128 only"


@hookimpl
def phireg_config_fields() -> FieldTable:
    """How Phi-3-small's config.json becomes the checkpoint's."""
    original = field(
        *in_rope("original_max_position_embeddings"),
        "original_max_position_embeddings",
        to="original_max_position_embeddings",
        kind=integer(2, 2**31),
    )
    return FieldTable(
        const("architecture", "Phi3SmallForCausalLM"),
        *dimensions(),
        *grouped_heads(),
        same_as("num_key_value_heads", to="num_kv_heads"),
        check("head_size", known_head_size, severity=Severity.WARNING),
        derive("intermediate_size", intermediate_size, "ff_intermediate_size or its rule"),
        field("hidden_act", kind=text, via={"gegelu": "gegelu"}, default="gegelu"),
        field("gegelu_limit", kind=positive, default=20.0, null=None),
        field("layer_norm_epsilon", to="norm_epsilon", kind=positive, default=1e-5),
        check("layer_norm_epsilon", fixed_epsilon, severity=Severity.WARNING),
        supported_rope("default", "longrope", "su"),
        rotary_base("rope_embedding_base", "rope_theta", default=1e6),
        same_as("rotary_base", to="rotary_embedding_base"),
        refuse("rope_parameters.partial_rotary_factor", unless=[1.0], why="whole heads rotate"),
        const("rotary_pct", 1.0),
        derive("rotary_embedding_dim", rotary_dim, "head_size"),
        when(
            is_long_rope,
            *long_rope_factors(original),
            derive("longrope_short_mscale", short_mscale, "short_mscale, or 1"),
            derive("longrope_long_mscale", long_mscale, "long_mscale, or the long-rope formula"),
            otherwise=(const("position_embedding_type", "rope_gpt_neox"),),
        ),
        check("rope_position_scale", position_scale),
        # The source class ties by default; its published files have no head of their own.
        field("tie_word_embeddings", kind=boolean, default=True),
        field("mup_embedding_multiplier", kind=number, default=10.0, null=0.0),
        field("mup_width_multiplier", kind=positive, default=8.0, null=1.0),
        field("mup_attn_multiplier", kind=positive, default=1.0),
        field("mup_use_scaling", kind=boolean, default=True),
        refuse(
            "mup_attn_multiplier", unless=[1.0], why="TensorRT-LLM scales scores by 1/head_size"
        ),
        refuse("mup_use_scaling", unless=[True], why="TensorRT-LLM scales scores by 1/head_size"),
        field("blocksparse_block_size", kind=integer(), default=64),
        field("blocksparse_num_local_blocks", kind=integer(), default=16),
        field(
            "blocksparse_vert_stride", to="blocksparse_vertical_stride", kind=integer(), default=8
        ),
        field("blocksparse_homo_head_pattern", kind=boolean, default=False),
        derive("dense_attention_every_n_layers", dense_every, "the same, 0 and null as never"),
        *CONSTANTS,
        *BOOKKEEPING,
        ignore(
            "attention_dropout_prob",
            "embedding_dropout_prob",
            "ffn_dropout_prob",
            why="training only",
        ),
        ignore("attention_bias", why="every linear has a bias, whatever it says"),
        ignore(
            "blocksparse_triton_kernel_block_size",
            "pad_sequence_to_multiple_of_64",
            "reorder_and_upcast_attn",
            why="chooses the source's kernels",
        ),
        ignore("gegelu_pad_to_256", "ff_dim_multiplier", why="read with intermediate_size"),
        ignore("rope_position_scale", why="unused with long rope, else checked"),
        ignore("original_max_position_embeddings", why="used with long rope only"),
        ignore("dummy_token_indices", why="the reader does not mask logits"),
    )
