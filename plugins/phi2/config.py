"""phi-2's config fields; older layouts use GPT-2's names (``n_embd``, ``n_layer``)."""

import math

import phireg.api as ph

DEFAULTS = {
    "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 51200,
    "max_position_embeddings": 2048,
}  # fmt: skip
"""What transformers' PhiConfig takes for absent keys."""

TANH_GELU = dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_new"
)
"""Names of the tanh form; ``gelu`` is the erf form, which TensorRT-LLM lacks."""


def rotary_pct(fields: ph.Fields, hf: ph.HFConfig) -> float:
    """Compute the rotated share of a head, which configs state as a share or as dimensions.

    Without either it is one half, transformers' default for phi. Older configs (those with
    ``n_embd``) state dimensions, 32 if absent; more than a head has means the whole head.
    """
    size = fields["head_size"]
    shares = ph.rotary_shares(hf)
    rotated = {key: int(size * value) for key, value in shares.items()}
    stated = hf.get("rotary_dim")
    if stated is None and not shares and hf.has("n_embd"):
        stated = 32
    if stated is not None:
        try:
            rotated["rotary_dim"] = min(ph.integer()(stated), size)
        except ValueError as problem:
            raise ph.ConfigError(f"rotary_dim is {stated!r}: {problem}") from None
    if len(set(rotated.values())) > 1:
        listed = ", ".join(f"{key}: {count}" for key, count in rotated.items())
        raise ph.ConfigError(f"the numbers of rotated dimensions disagree ({listed})")
    if shares or not rotated:
        return float(next(iter(shares.values()), 0.5))
    share = rotated["rotary_dim"] / size
    # Readers compute int(head_size * share), which must not fall below the number it came from.
    return share if int(size * share) == rotated["rotary_dim"] else math.nextafter(share, 2)


def no_grouping(fields: ph.Fields, _: ph.HFConfig) -> str | None:
    """Refuse grouped KV heads: qkv of TensorRT-LLM's phi model has 3 x hidden rows."""
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads == kv_heads:
        return None
    return f"is {kv_heads} for {heads} heads; TensorRT-LLM's phi-2 has no grouped KV heads"


def fixed_epsilon(fields: ph.Fields, _: ph.HFConfig) -> str | None:
    """Report another epsilon: TensorRT-LLM's phi model never passes it to its LayerNorm."""
    epsilon = fields["norm_epsilon"]
    return None if epsilon == 1e-5 else f"is {epsilon}, but TensorRT-LLM computes phi-2 with 1e-05"


@ph.hookimpl
def phireg_config_fields() -> ph.FieldTable:
    """Translate phi-2's config.json."""
    return ph.FieldTable(
        ph.const("architecture", "PhiForCausalLM"),
        *ph.dimensions(
            hidden_size="n_embd",
            num_hidden_layers="n_layer",
            num_attention_heads="n_head",
            max_position_embeddings="n_positions",
            defaults=DEFAULTS,
        ),
        *ph.grouped_heads("n_head_kv"),
        ph.check("num_key_value_heads", no_grouping),
        ph.field(
            "intermediate_size",
            "n_inner",
            kind=ph.integer(1, 2**20),
            default=lambda fields: 4 * fields["hidden_size"],
        ),
        ph.field(
            *("hidden_act", "activation_function"),
            kind=ph.text,
            via=TANH_GELU,
            default="gelu_new",
        ),
        ph.field(
            "layer_norm_eps",
            "layer_norm_epsilon",
            to="norm_epsilon",
            kind=ph.positive,
            default=1e-5,
        ),
        ph.check("layer_norm_eps", fixed_epsilon, severity=ph.Severity.WARNING),
        ph.supported_rope("default"),
        ph.const("position_embedding_type", "rope_gpt_neox"),
        ph.rotary_base("rope_theta", default=10000.0),
        ph.derive("rotary_pct", rotary_pct, "partial_rotary_factor, or rotary_dim / head_size"),
        ph.OUTRANKED_SHARE,
        ph.same_as("rotary_pct", to="partial_rotary_factor"),
        ph.derive("rotary_embedding_dim", ph.rotary_dim, "int(head_size * rotary_pct)"),
        ph.field("tie_word_embeddings", kind=ph.boolean, default=False),
        ph.refuse("qk_layernorm", unless=[False], why="TensorRT-LLM's phi-2 has no q/k norms"),
        *ph.CONSTANTS,
        *ph.BOOKKEEPING,
        ph.refuse("architecture.block_cls", unless=["parallel"], why="phi's blocks are parallel"),
        ph.refuse("embd_layer", unless=["default"], why="phi has a plain embedding"),
        ph.ignore("architecture", why="names the sequential layout's building blocks"),
        ph.ignore("flash_attn", "flash_rotary", "fused_dense", why="chooses the source's kernels"),
        ph.ignore("phyagi_version", why="tells how the file was made"),
        ph.ignore("pad_vocab_size_multiple", why="vocab_size is padded already"),
        ph.ignore("rotary_dim", why="read with rotary_pct"),
    )
