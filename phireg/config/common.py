"""Field-table entries that several families share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phireg.config.fields import (
    ConfigError,
    Entry,
    Fields,
    check,
    const,
    derive,
    factors,
    field,
    ignore,
    integer,
    positive,
)
from phireg.config.hf import HFConfig
from phireg.findings import Severity
from phireg.ranges import largest

BLOCKS = ("rope_parameters", "rope_scaling")
"""The blocks of rope settings: transformers 5 writes the first, 4 the second."""

LONG_ROPE_TYPES = ("longrope", "su")
"""Two names of one thing: April 2024 checkpoints say ``su``, later ones ``longrope``."""


def in_rope(key: str) -> tuple[str, ...]:
    """Return the dotted spellings of a key of the rope block."""
    return tuple(f"{block}.{key}" for block in BLOCKS)


def _rope_types(hf: HFConfig) -> dict[str, str]:
    """Return the type under every spelling; transformers 4.43 and later write two in a block."""
    keys = (*in_rope("rope_type"), *in_rope("type"))
    types = {key: str(hf.get(key)) for key in keys if hf.has(key)}
    factors = list(_in_block(hf, "factor").values())
    if factors and all(factor == 1 for factor in factors):  # positions divided by 1 are plain ones
        return {k: "default" if name == "linear" else name for k, name in types.items()}
    return types


def _in_block(hf: HFConfig, *names: str) -> dict[str, Any]:
    """Return the keys of the rope block that have a value, by their dotted spellings."""
    keys = (key for name in names for key in in_rope(name))
    return {key: hf.get(key) for key in keys if hf.has(key)}


def rope_type(hf: HFConfig) -> str:
    """Return the source's rope type; ``default`` if it names none."""
    return next(iter(_rope_types(hf).values()), "default")


def is_long_rope(hf: HFConfig) -> bool:
    """Return whether the rope block says long rope, whatever the context length is."""
    return rope_type(hf) in LONG_ROPE_TYPES


def supported_rope(*types: str) -> Entry:
    """Refuse a rope type other than ``types``, types that disagree, and factors without a type."""

    def problem(_: Fields, hf: HFConfig) -> str | None:
        types_by_key = _rope_types(hf)
        distinct = {"longrope" if t in LONG_ROPE_TYPES else t for t in types_by_key.values()}
        if len(distinct) > 1:
            listed = ", ".join(f"{key} is '{name}'" for key, name in types_by_key.items())
            return f"names different rope types: {listed}"
        actual = rope_type(hf)
        if actual not in types:
            return f"rope type '{actual}' is not supported; supported: {', '.join(types)}"
        if actual == "default" and _in_block(hf, "short_factor", "long_factor"):
            return "has rope factors but no rope type; say 'longrope' if that is meant"
        if actual == "default":
            for key, value in _in_block(hf, "factor", "attention_factor").items():
                if value != 1:
                    return f"has {key} {value!r} but no rope type that uses it"
            _in_block(hf, "original_max_position_embeddings")  # no plain rope uses it
        return None

    return check("rope_scaling", problem)


def dimensions(*, defaults: Mapping[str, int] | None = None, **aliases: str) -> tuple[Entry, ...]:
    """Read hidden_size, num_hidden_layers, num_attention_heads, head_size and vocab_size.

    Args:
        defaults: what the source's class takes for keys that are absent, by the usual key; without
            them every key is required.
        aliases: another spelling of a source key, by the usual one (``hidden_size="n_embd"``).
    """

    def size(key: str) -> tuple[Entry, ...]:
        keys = (key, aliases[key]) if key in aliases else (key,)
        kind = integer(1, largest(key))
        if defaults is None:
            return (field(*keys, kind=kind),)

        def absent(fields: Fields, hf: HFConfig) -> str | None:
            known = any(hf.has(spelling) for spelling in keys)
            return None if known else f"is absent: the source's class takes {fields[key]}"

        return (
            field(*keys, kind=kind, default=defaults[key]),
            check(key, absent, severity=Severity.NOTE),
        )

    def head_size(fields: Fields, hf: HFConfig) -> int:
        hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
        if (head_dim := hf.get("head_dim")) is not None:
            try:
                return int(integer(1, largest("head_size"))(head_dim))
            except ValueError as error:
                raise ConfigError(f"head_dim is {head_dim!r}: {error}") from None
        if hidden % heads:
            raise ConfigError(f"hidden_size {hidden} cannot be divided by {heads} heads")
        return int(hidden // heads)

    return (
        *size("hidden_size"),
        *size("num_hidden_layers"),
        *size("num_attention_heads"),
        *size("vocab_size"),
        *size("max_position_embeddings"),
        derive("head_size", head_size, "head_dim, or hidden_size / num_attention_heads"),
    )


def grouped_heads(*aliases: str, default: int | None = None) -> tuple[Entry, ...]:
    """Read num_key_value_heads, which must divide the attention heads.

    Args:
        aliases: other spellings of the source key.
        default: what the source's class takes if the key is absent; None for the attention heads.
    """

    def divides(fields: Fields, _: HFConfig) -> str | None:
        heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        return f"{heads} heads cannot share {kv_heads} KV heads" if heads % kv_heads else None

    return (
        field(
            "num_key_value_heads",
            *aliases,
            kind=integer(1, largest("num_key_value_heads")),
            default=lambda fields: fields["num_attention_heads"] if default is None else default,
        ),
        check("num_key_value_heads", divides),
    )


def long_rope_factors(original: Entry) -> tuple[Entry, ...]:
    """Read the long-rope fields, whose presence switches TensorRT-LLM's model to long rope.

    Args:
        original: the entry that produces ``original_max_position_embeddings``.
    """

    def fits(fields: Fields, _: HFConfig) -> str | None:
        frequencies = fields["rotary_embedding_dim"] // 2
        short, long = (
            len(fields[f"longrope_scaling_{name}_factors"]) for name in ("short", "long")
        )
        if short == long == frequencies:
            return None
        return (
            f"has {short} short and {long} long factors, "
            f"not one for each of {frequencies} rotary frequencies"
        )

    def stated_factor(key: str) -> Entry:
        """Compare a stated factor by its value: transformers recommends to write it."""

        def differs(fields: Fields, hf: HFConfig) -> str | None:
            stated = hf.get(key)
            ratio = fields["max_position_embeddings"] / fields["original_max_position_embeddings"]
            known = isinstance(stated, int | float) and math.isclose(stated, ratio, rel_tol=1e-6)
            if stated is None or known:
                return None
            return (
                f"is {stated!r}, but TensorRT-LLM scales by max_position_embeddings / "
                f"original_max_position_embeddings, {ratio:g}"
            )

        return check(key, differs)

    return (
        const("position_embedding_type", "long_rope"),
        original,
        *map(stated_factor, in_rope("factor")),
        field(*in_rope("short_factor"), kind=factors, to="longrope_scaling_short_factors"),
        field(*in_rope("long_factor"), kind=factors, to="longrope_scaling_long_factors"),
        check("rope_scaling", fits),
    )


def long_rope_scale(maximum: int, original: int) -> float:
    """Return the default factor on cos and sin: sqrt(1 + ln(maximum/original) / ln(original))."""
    ratio = maximum / original
    return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))


def rotary_base(*keys: str, default: float) -> Entry:
    """Read theta under every spelling; readers call it ``rotary_base``."""
    return field(
        "rope_parameters.rope_theta", *keys, to="rotary_base", kind=positive, default=default
    )


def rotary_shares(hf: HFConfig) -> dict[str, float]:
    """Return what config.json says of the rotated share of a head, by key; all of it counts.

    Transformers 5.0 to 5.17 write ``partial_rotary_factor`` at the top level, too, and there it may
    be the default of the class: every release 5 builds the model from ``rope_parameters``. Releases
    4 know only the top level. They write ``rope_theta`` there, and beside that both count.

    Raises:
        ConfigError: a value is not a share.
    """
    block = "rope_parameters.partial_rotary_factor"
    keys = (*in_rope("partial_rotary_factor"), "partial_rotary_factor")
    shares = {key: hf.get(key) for key in keys if hf.has(key)}
    for key, value in shares.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
            raise ConfigError(f"{key} is {value!r}: expected a number above 0, at most 1")
    if block in shares and not hf.has("rope_theta"):
        shares.pop("partial_rotary_factor", None)
    return shares


def rotary_share(default: float) -> tuple[Entry, ...]:
    """Read ``partial_rotary_factor``, which readers call ``rotary_pct``."""

    def share(_: Fields, hf: HFConfig) -> float:
        shares = rotary_shares(hf)
        if len(set(shares.values())) > 1:
            listed = ", ".join(f"{key}: {value}" for key, value in shares.items())
            raise ConfigError(f"the shares of a head that rotate disagree ({listed})")
        return next(iter(shares.values()), default)

    return derive("rotary_pct", share, "partial_rotary_factor"), OUTRANKED_SHARE


def _outranked_share(_: Fields, hf: HFConfig) -> str | None:
    shares, stated = rotary_shares(hf), hf.get("partial_rotary_factor")
    if stated is None or "partial_rotary_factor" in shares or stated in shares.values():
        return None
    key, value = next(iter(shares.items()))
    return f"is {stated} at the top level, but {key} is {value}: transformers 5 reads the latter"


OUTRANKED_SHARE = check("partial_rotary_factor", _outranked_share, severity=Severity.NOTE)
"""Notes a ``partial_rotary_factor`` that does not count."""


def rotary_dim(fields: Fields, _: HFConfig) -> int:
    """Compute the rotated dimensions of a head as readers do: int(head_size * rotary_pct).

    Raises:
        ConfigError: it is odd or not within the head.
    """
    head_size = fields["head_size"]
    if fields["rotary_pct"] > 1:
        raise ConfigError(f"rotary_pct is {fields['rotary_pct']}: expected at most 1")
    rotated = int(head_size * fields["rotary_pct"])
    if rotated % 2 or not 0 < rotated <= head_size:
        raise ConfigError(
            f"{rotated} of a head's {head_size} dimensions cannot be rotated in pairs"
        )
    return rotated


def same_as(source: str, to: str) -> Entry:
    """Write ``to`` with the value of ``source``, for releases of readers that use that name."""
    return derive(to, lambda fields, _: fields[source], source)


CONSTANTS = (
    const("logits_dtype", "float32"),
    const("rotary_scaling", None),
    const("qk_layernorm", False),
    const("use_parallel_embedding", False),
    const("embedding_sharding_dim", 0),
    const("share_embedding_table", False),
)
"""Fields with one value in every checkpoint phireg writes.

``rotary_scaling`` is null even for long rope: readers build that from the ``longrope_*`` fields and
raise on type ``su``. Embeddings are whole on every rank, and lm_head always has its own tensor.
"""

BOOKKEEPING = (
    ignore("architectures", "model_type", "auto_map", why="names the source's own code"),
    ignore("torch_dtype", "dtype", why="read with --dtype auto"),
    ignore(
        *("_name_or_path", "_attn_implementation", "_attn_implementation_autoset"),
        *("transformers_version", "unsloth_version", "unsloth_fixed"),
        why="tells how the file was made",
    ),
    ignore(
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_attentions"),
        *("output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
        *("id2label", "label2id", "problem_type", "num_labels", "cross_attention_hidden_size"),
        *("torchscript", "pretraining_tp"),
        why="concerns generation or another task",
    ),
    ignore(
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        *("initializer_range", "gradient_checkpointing"),
        why="training only",
    ),
)
"""Source keys without a counterpart that any family's config.json may have."""


def sliding_window(fields: Fields, hf: HFConfig) -> str | None:
    """Report a window: TensorRT-LLM takes it at run time, not from the checkpoint."""
    window, length = hf.get("sliding_window"), fields["max_position_embeddings"]
    if not isinstance(window, int) or window >= length:
        return None
    return (
        f"is {window} of {length} positions; TensorRT-LLM attends to all unless it is run with "
        f"--max_attention_window_size {window}"
    )
