"""The meaning of Hugging Face directories: their architectures, modules and config.json.

A further architecture is a row of ``MODELS``. Facts are from transformers' classes and from that
of Phi-3-small; they are written down apart from what converts and what writes such directories.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from phireg.dtypes import WEIGHT_DTYPES
from phireg.reader.architectures import ARCHITECTURES, Activation
from phireg.reader.config import Config
from phireg.reader.schemes import Quantization
from phireg.reader.spec import BlockSparse, Experts, ModelSpec, Rope, check_heads

Order: TypeAlias = Literal["plain", "halves", "groups"]
"""The rows of a module beside those of the blueprint's linear: the same, the two halves exchanged
(gate | up), or for each key/value head its queries, its key and its value."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of the blueprint: the modules whose rows it has, one behind the other."""

    modules: tuple[str, ...]  # after the layer's prefix, and that of an expert
    order: Order = "plain"


@dataclass(frozen=True, slots=True)
class Model:
    """A model class."""

    architecture: str  # the blueprint's, which has its norms, residual and biases
    linears: Mapping[str, Linear]
    """Of a layer, by the blueprint's names; in a mixture mlp. is of each expert."""
    norms: Mapping[str, str]  # by the blueprint's names: those of a layer and transformer.ln_f
    epsilon: str  # key of the norms' epsilon
    activations: Mapping[str, Activation]  # by hidden_act
    partial: float = 1.0  # the part of a head that is rotated, where no key says so
    tied: bool = False  # lm_head is the embedding, where no key says so
    intermediate: str = "intermediate_size"  # key of the inner size
    default_epsilon: float = 1e-5  # of the norms, where no key says so
    router: str = ""  # module that scores the experts
    experts: str = ""  # what stands before an expert's modules, with its number


_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
    "transformer.ln_f": "model.norm",
}
_SEPARATE = Linear(tuple(f"self_attn.{part}_proj" for part in "qkv"))
_TANH: Mapping[str, Activation] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

MODELS: Mapping[str, Model] = {
    "PhiForCausalLM": Model(
        "PhiForCausalLM",
        {
            "attention.qkv": _SEPARATE,
            "attention.dense": Linear(("self_attn.dense",)),
            "mlp.fc": Linear(("mlp.fc1",)),
            "mlp.proj": Linear(("mlp.fc2",)),
        },
        {"input_layernorm": "input_layernorm", "transformer.ln_f": "model.final_layernorm"},
        "layer_norm_eps",
        _TANH,
        partial=0.5,
    ),
    "Phi3ForCausalLM": Model(
        "Phi3ForCausalLM",
        {
            "attention.qkv": Linear(("self_attn.qkv_proj",)),
            "attention.dense": Linear(("self_attn.o_proj",)),
            "mlp.fc": Linear(("mlp.gate_up_proj",), "halves"),
            "mlp.proj": Linear(("mlp.down_proj",)),
        },
        _NORMS,
        "rms_norm_eps",
        {"silu": "swiglu"},
    ),
    "LlamaForCausalLM": Model(
        "Phi3ForCausalLM",
        {
            "attention.qkv": _SEPARATE,
            "attention.dense": Linear(("self_attn.o_proj",)),
            "mlp.fc": Linear(("mlp.up_proj", "mlp.gate_proj")),
            "mlp.proj": Linear(("mlp.down_proj",)),
        },
        _NORMS,
        "rms_norm_eps",
        {"silu": "swiglu"},
        default_epsilon=1e-6,
    ),
    "Phi3SmallForCausalLM": Model(
        "Phi3SmallForCausalLM",
        {
            "attention.qkv": Linear(("self_attn.query_key_value",), "groups"),
            "attention.dense": Linear(("self_attn.dense",)),
            "mlp.fc": Linear(("mlp.up_proj",)),
            "mlp.proj": Linear(("mlp.down_proj",)),
        },
        _NORMS | {"transformer.ln_f": "model.final_layernorm"},
        "layer_norm_epsilon",
        {"gegelu": "gegelu"},
        tied=True,
        intermediate="ff_intermediate_size",
    ),
    "PhiMoEForCausalLM": Model(
        "PhiMoEForCausalLM",
        {
            "attention.qkv": _SEPARATE,
            "attention.dense": Linear(("self_attn.o_proj",)),
            "mlp.fc": Linear(("w3", "w1")),
            "mlp.proj": Linear(("w2",)),
        },
        _NORMS,
        "rms_norm_eps",
        {"silu": "swiglu"},
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts.{}.",
    ),
}
"""By the first of ``architectures`` in config.json."""

_SAME = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""Names of the same class; transformers 5 writes PhimoeForCausalLM."""

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

# Keys that change the computation, and the only values with which they have a meaning here.
_INERT: Mapping[str, tuple[Any, ...]] = {
    "qk_layernorm": (None, False),
    "mlp_bias": (None, False),
    "ff_dim_multiplier": (None,),
    "rope_position_scale": (None, 1, 1.0),
    "num_experts_per_tok": (None, 2),
    "use_sliding_window": (None,),
}


def find_model(config: Config) -> Model:
    """Return the row of config.json's architecture."""
    names = config.values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    row = MODELS.get(_SAME.get(name, name)) if isinstance(name, str) else None
    if row is None:
        raise config.error(
            f"architectures is {names!r}, whose modules are unknown",
            f"known are {', '.join(MODELS)}",
        )
    return row


def parse_model(values: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """Turn the config.json of a Hugging Face directory into a spec, without its quantization."""
    config = Config(values, where)
    row = find_model(config)
    for key, inert in _INERT.items():
        if config.values.get(key) not in inert:
            raise config.error(f"{key} is {config.values[key]!r}, which has no meaning here")
    architecture = ARCHITECTURES[row.architecture]
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    head_size = config.integer("head_dim", default=hidden // heads)
    small = architecture.block_sparse
    positions = config.integer("max_position_embeddings")
    window = (
        config.integer("sliding_window") if config.has("sliding_window") and not small else None
    )
    multiplier = config.number("mup_embedding_multiplier", default=10.0) if small else 1.0
    spec = ModelSpec(
        architecture=architecture,
        dtype=_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer(row.intermediate),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", default=heads),
        head_size=head_size,
        tp_size=1,
        activation=_activation(config, row),
        quantization=Quantization(),
        experts=Experts(config.integer("num_local_experts"), 1) if row.experts else None,
        embedding_split=None,
        max_position_embeddings=positions,
        norm_epsilon=config.positive(row.epsilon, default=row.default_epsilon),
        gegelu_limit=config.positive("gegelu_limit") if config.has("gegelu_limit") else None,
        rope=_rope(config, row, head_size, positions),
        attention_scale=_attention_scale(config, head_size) if small else head_size**-0.5,
        embedding_multiplier=multiplier if multiplier > 0 else 1.0,
        logits_divisor=config.positive("mup_width_multiplier", default=8.0) if small else 1.0,
        sparse=_sparse(config, heads) if small else None,
        mixer_epsilon=config.positive("router_jitter_noise", default=0.01) if row.experts else 0.0,
        sliding_window=window if window is not None and window < positions else None,
    )
    if architecture.experts:
        _check_biases(config)
    check_heads(config, spec)
    return spec


def _dtype(config: Config) -> str:
    value = config.values.get("dtype", config.values.get("torch_dtype"))
    name = str(value).removeprefix("torch.")
    if name not in WEIGHT_DTYPES:
        raise config.error(f"dtype is {value!r}", f"known are {', '.join(WEIGHT_DTYPES)}")
    return name


def _activation(config: Config, row: Model) -> Activation:
    name = str(config.values.get("hidden_act", next(iter(row.activations))))
    if name not in row.activations:
        raise config.error(f"hidden_act is {name!r}", f"known are {', '.join(row.activations)}")
    return row.activations[name]


def _rope(config: Config, row: Model, head_size: int, positions: int) -> Rope:
    # Of transformers 5 or 4; empty for plain rope.
    block = config.block("rope_parameters" if config.has("rope_parameters") else "rope_scaling")

    def number(key: str, *more: str, default: float) -> float:
        if block.has(key):
            return block.positive(key)
        return config.positive(key, *more, default=default)

    small = row.architecture == "Phi3SmallForCausalLM"
    base = number("rope_theta", "rope_embedding_base", default=1e6 if small else 10000.0)
    dim = int(head_size * min(number("partial_rotary_factor", default=row.partial), 2.0))
    if dim % 2 or not 0 < dim <= head_size:
        raise config.error(f"{dim} of {head_size} dimensions are rotated: not an even part")
    kind = block.values.get("rope_type", block.values.get("type", "default"))
    if kind in (None, "default"):
        return Rope(dim, base)
    if kind not in ("longrope", "su"):
        raise block.error(f"the rope type is {kind!r}", "known are default and longrope")
    if row.architecture == "PhiForCausalLM":
        raise block.error("long rope has no meaning in PhiForCausalLM")
    inside, key = block.has("original_max_position_embeddings"), "original_max_position_embeddings"
    holder = block if inside and (small or not config.has(key)) else config
    original = holder.integer(key, default=positions)
    short_mscale, long_mscale = _mscales(config, block, row, original, positions)
    return Rope(
        dim,
        base,
        short=block.numbers("short_factor", dim // 2),
        long=block.numbers("long_factor", dim // 2),
        short_mscale=short_mscale,
        long_mscale=long_mscale,
        original=original,
    )


def _mscales(
    config: Config, block: Config, row: Model, original: int, positions: int
) -> tuple[float, float]:
    """Return what cos and sin are multiplied by, up to the original length and above it."""
    stretch = positions / original
    if row.architecture == "Phi3ForCausalLM" and block.has("attention_factor"):
        stated = block.positive("attention_factor")
        return stated, stated
    if row.architecture == "Phi3ForCausalLM" and block.has("factor"):
        stretch = block.positive("factor")
    root = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    if row.architecture == "Phi3ForCausalLM":
        return root, root
    if row.architecture == "PhiMoEForCausalLM":
        return block.positive("short_mscale"), block.positive("long_mscale")
    short, long = (block.number(key, default=-1.0) for key in ("short_mscale", "long_mscale"))
    return short if short > 0 else 1.0, long if long > 0 else root


def _attention_scale(config: Config, head_size: int) -> float:
    if not config.flag("mup_use_scaling", default=True):
        return float(head_size**-0.5)
    return config.positive("mup_attn_multiplier", default=1.0) / head_size


def _sparse(config: Config, heads: int) -> BlockSparse:
    stride = config.integer("blocksparse_vert_stride", default=8)
    homogeneous = config.flag("blocksparse_homo_head_pattern", default=False)
    return BlockSparse(
        block_size=config.integer("blocksparse_block_size", default=64),
        num_local_blocks=config.integer("blocksparse_num_local_blocks", default=16),
        vertical_stride=stride,
        head_step=0 if homogeneous else max(1, stride // heads),
        dense_every=config.integer("dense_attention_every_n_layers", default=2),
    )


def _check_biases(config: Config) -> None:
    """Refuse a mixture whose attention or head has no biases: the blueprint's has them."""
    for key in ("attention_bias", "lm_head_bias"):
        if not config.flag(key, default=False):
            raise config.error(f"{key} is not true, which has no meaning here")
