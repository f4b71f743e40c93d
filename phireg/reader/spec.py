"""A checkpoint's config.json in a closed vocabulary whose meaning is TensorRT-LLM's.

``Dimensions`` decide the tensors of a rank file; ``ModelSpec`` decides what they compute, too. The
executor computes with nothing else: code behind it never looks at an architecture's name. A key,
an activation or a feature that has no exact meaning here is an error, never a guess.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phireg.dtypes import WEIGHT_DTYPES
from phireg.files.json import read_json_object
from phireg.reader.architectures import (
    ACTIVATIONS,
    ARCHITECTURES,
    LONG_FACTORS,
    SHORT_FACTORS,
    Activation,
    Architecture,
    mapping_problems,
)
from phireg.reader.config import Config
from phireg.reader.schemes import Quantization, check_quantization, parse_quantization

# TensorRT-LLM's number for choosing experts as sparse mixer does.
_SPARSE_MIXER = 2
# Further keys of ``moe``, and the values with which they change nothing.
_INERT_MOE: dict[str, tuple[Any, ...]] = {
    "tp_mode": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "device_limited_n_group": (None, 0),
    "device_limited_topk_group": (None, 0),
    "device_limited_routed_scaling_factor": (None, 1.0),
}
_MOE = {"num_experts", "top_k", "normalization_mode", "sparse_mixer_epsilon", *_INERT_MOE}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of the first ``dim`` of every query and key head's dimensions.

    Frequencies are base^(-2j/R), divided by the ``short`` factors up to ``original`` tokens and by
    the ``long`` ones above; None is plain rope. Cos and sin are multiplied by the mscale.
    """

    dim: int  # R, even; the halves [0, R/2) and [R/2, R) form the pairs
    base: float
    short: tuple[float, ...] | None = None
    long: tuple[float, ...] | None = None
    short_mscale: float = 1.0
    long_mscale: float = 1.0
    original: int = 0


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """The mask of a block-sparse layer; ``executor.attention.visible`` is its formula."""

    block_size: int  # tokens
    num_local_blocks: int  # that a query sees, back from its own, which counts
    vertical_stride: int  # of the blocks further back, it sees every one in so many
    head_step: int  # by which that stripe moves from one (global) head to the next
    dense_every: int  # layer i (from 0) is dense when i + 1 is a multiple of this


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts of a layer, ``count`` in all; rank r has those of share r mod ``ep_size``."""

    count: int
    ep_size: int

    @property
    def rank_count(self) -> int:
        """Experts of one rank."""
        return -(-self.count // self.ep_size)

    def first(self, rank: int) -> int:
        """Return the number of a rank's first expert."""
        return rank % self.ep_size * self.rank_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The names, shapes and dtypes of a rank file's tensors follow from these.

    Sizes that the ranks do not divide are rounded up, as TensorRT-LLM's reader does. Of fc's
    output, "swiglu" is silu(second half) * first half, "gegelu" takes the even ones as the gate
    and the odd ones as the value, "gelu_tanh" has no gate.
    """

    architecture: Architecture
    dtype: str  # "float16", "bfloat16" or "float32"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    tp_size: int
    activation: Activation
    quantization: Quantization
    experts: Experts | None  # in the MLP's place
    embedding_split: int | None  # the dimension in which the ranks divide the embedding

    @property
    def rank_heads(self) -> int:
        """Query heads of one rank."""
        return -(-self.num_heads // self.tp_size)

    @property
    def rank_kv_heads(self) -> int:
        """Key/value heads of one rank: with more ranks than heads, each rank holds one copy."""
        return -(-self.num_kv_heads // self.tp_size)

    @property
    def rank_intermediate_size(self) -> int:
        """One rank's part of the inner dimension of the MLP, or of each expert."""
        divided = self.tp_size if self.experts is None else self.tp_size // self.experts.ep_size
        return -(-self.intermediate_size // max(1, divided))

    @property
    def rank_vocab_size(self) -> int:
        """One rank's rows of lm_head: the vocabulary is rounded up to the number of ranks."""
        return -(-self.vocab_size // self.tp_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(Dimensions):
    """Everything that decides what the tensors of a checkpoint compute."""

    max_position_embeddings: int
    norm_epsilon: float
    gegelu_limit: float | None
    rope: Rope
    attention_scale: float  # of q . k
    embedding_multiplier: float
    logits_divisor: float
    sparse: BlockSparse | None  # None when all layers are dense
    mixer_epsilon: float  # by which sparse mixer compares the scores of experts
    sliding_window: int | None = None  # tokens that a query sees, its own included

    def is_sparse(self, layer: int) -> bool:
        """Return whether layer ``layer`` (from 0) has the block-sparse mask."""
        return self.sparse is not None and (layer + 1) % self.sparse.dense_every != 0


def read_spec(checkpoint_dir: Path) -> ModelSpec:
    """Read a checkpoint's config.json; a CheckError if it asks for something unknown."""
    path = checkpoint_dir / "config.json"
    return parse_spec(read_json_object(path), str(path))


def parse_dimensions(config: Config, tp_size: int) -> Dimensions:
    """Read the sizes of a checkpoint of a known architecture; ``hidden_act`` may be absent."""
    row = ARCHITECTURES[config.get("architecture")]
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    older = row.older_names.get("num_key_value_heads")
    kv_heads = config.integer(
        "num_key_value_heads", *filter(None, [older]), default=None if older else heads
    )
    experts, mapping = None, config.block("mapping")
    if row.experts:
        ep_size = mapping.integer("moe_ep_size", default=1)
        experts = Experts(config.block("moe").integer("num_experts"), ep_size)
    split = None
    if config.values.get("use_parallel_embedding"):
        split = 1 if config.values.get("embedding_sharding_dim") == 1 else 0
    return Dimensions(
        architecture=row,
        dtype=str(config.get("dtype")),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=config.integer("head_size", default=hidden // heads),
        tp_size=tp_size,
        activation=ACTIVATIONS.get(str(config.values.get("hidden_act")), row.activation),
        quantization=parse_quantization(config),
        experts=experts,
        embedding_split=split,
    )


def parse_spec(values: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """Turn config.json's object, called ``where`` in errors, into a spec."""
    config = Config(values, where)
    _check_known(config)
    mapping = config.block("mapping")
    for problem in mapping_problems(mapping.values):
        raise mapping.error(problem)
    dimensions = parse_dimensions(config, mapping.integer("tp_size", default=1))
    row, head_size = dimensions.architecture, dimensions.head_size
    epsilon = config.positive("norm_epsilon", default=1e-5)
    multiplier = config.number("mup_embedding_multiplier") if row.block_sparse else 0
    spec = ModelSpec(
        **{f.name: getattr(dimensions, f.name) for f in dataclasses.fields(Dimensions)},
        max_position_embeddings=config.integer("max_position_embeddings"),
        norm_epsilon=epsilon if row.norm_epsilon is None else row.norm_epsilon,
        gegelu_limit=config.positive("gegelu_limit") if config.has("gegelu_limit") else None,
        rope=_rope(config, row, head_size),
        # Phi-3-small is built with q_scaling = sqrt(d), whatever mup_attn_multiplier says.
        attention_scale=1 / head_size if row.block_sparse else head_size**-0.5,
        embedding_multiplier=multiplier if multiplier > 0 else 1.0,
        logits_divisor=config.positive("mup_width_multiplier", default=1.0),
        sparse=_sparse(config, dimensions.num_heads) if row.block_sparse else None,
        mixer_epsilon=_mixer_epsilon(config) if row.experts else 0.0,
    )
    check_quantization(config, spec.num_layers)
    _check_division(config, spec)
    return spec


def _check_known(config: Config) -> None:
    """Refuse values that have no meaning for the executor."""
    tables: dict[str, Mapping[str, Any]] = {
        "architecture": ARCHITECTURES,
        "hidden_act": ACTIVATIONS,
        "dtype": WEIGHT_DTYPES,
    }
    for key, known in tables.items():
        value = config.get(key)
        if not isinstance(value, str) or value not in known:
            raise config.error(
                f"{key} {value!r} is unknown to the executor", f"known are {', '.join(known)}"
            )
    name = config.get("architecture")
    if config.values.get("moe") is not None and not ARCHITECTURES[name].experts:
        raise config.error(f"moe is set: {name} has no mixture-of-experts layers")
    if config.values.get("qk_layernorm"):
        raise config.error("qk_layernorm is set; TensorRT-LLM's Phi models have no such norm")
    if config.values.get("rotary_scaling") is not None:
        raise config.error("rotary_scaling is set: only plain rope and long rope are known")
    kind = config.values.get("position_embedding_type", "rope_gpt_neox")
    if kind not in ("rope_gpt_neox", "long_rope"):
        raise config.error(f"position_embedding_type is {kind!r}, not rope_gpt_neox or long_rope")


def _rope(config: Config, row: Architecture, head_size: int) -> Rope:
    def positive(key: str, default: float) -> float:
        if key in row.older_names:
            return config.positive(key, row.older_names[key])
        return config.positive(key, default=default)

    dim = int(head_size * min(positive("rotary_pct", 1.0), 2.0))  # more than 1 is refused below
    if dim % 2 or not 0 < dim <= head_size:
        raise config.error(
            f"rotary_pct gives {dim} rotary dimensions of {head_size}: not an even part"
        )
    base = positive("rotary_base", 10000.0)
    # The presence of the short list is TensorRT-LLM's switch.
    if not row.long_rope or not config.has(SHORT_FACTORS):
        if config.values.get("position_embedding_type") == "long_rope":
            raise config.error("position_embedding_type is long_rope without longrope factors")
        return Rope(dim, base)
    original = config.integer("original_max_position_embeddings")
    if row.mscales:
        short_mscale = config.positive("longrope_short_mscale")
        long_mscale = config.positive("longrope_long_mscale")
    else:
        stretch = config.integer("max_position_embeddings") / original
        mscale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        short_mscale = long_mscale = mscale
    return Rope(
        dim,
        base,
        short=config.numbers(SHORT_FACTORS, dim // 2),
        long=config.numbers(LONG_FACTORS, dim // 2),
        short_mscale=short_mscale,
        long_mscale=long_mscale,
        original=original,
    )


def _sparse(config: Config, num_heads: int) -> BlockSparse:
    stride = config.integer("blocksparse_vertical_stride")
    homogeneous = config.flag("blocksparse_homo_head_pattern")
    return BlockSparse(
        block_size=config.integer("blocksparse_block_size"),
        num_local_blocks=config.integer("blocksparse_num_local_blocks"),
        vertical_stride=stride,
        head_step=0 if homogeneous else max(1, stride // num_heads),
        dense_every=config.integer("dense_attention_every_n_layers"),
    )


def _mixer_epsilon(config: Config) -> float:
    """Read ``moe``, whose experts must be chosen by sparse mixer."""
    block = config.block("moe")
    for key, value in block.values.items():
        if key not in _MOE or value not in _INERT_MOE.get(key, (value,)):
            raise block.error(f"{key} is {value!r}, which the executor has no meaning for")
    if block.get("normalization_mode") != _SPARSE_MIXER or block.integer("top_k") != 2:
        raise block.error(
            f"normalization_mode {block.get('normalization_mode')!r} with top_k "
            f"{block.get('top_k')!r} is unknown to the executor",
            f"it knows mode {_SPARSE_MIXER}, sparse mixer, which chooses 2 experts",
        )
    return block.positive("sparse_mixer_epsilon")


def check_heads(config: Config, spec: ModelSpec) -> None:
    """Refuse sizes that heads do not divide."""
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if not (config.has("head_size") or config.has("head_dim")) and spec.hidden_size % heads:
        raise config.error(f"hidden_size {spec.hidden_size} is not a multiple of {heads} heads")
    if heads % kv_heads:
        raise config.error(f"{heads} heads cannot share {kv_heads} key/value heads evenly")


def _check_division(config: Config, spec: ModelSpec) -> None:
    """Refuse sizes that heads or ranks do not divide, and what no rank can hold alone."""
    check_heads(config, spec)
    heads, kv_heads, tp = spec.num_heads, spec.num_kv_heads, spec.tp_size
    if spec.architecture.grouped_since is None and kv_heads != heads:
        raise config.error(
            f"num_key_value_heads differs from num_attention_heads in {spec.architecture.name}"
        )
    if heads % tp:
        raise config.error(f"{heads} heads cannot be split over {tp} ranks")
    if kv_heads % tp and tp % kv_heads:
        raise config.error(f"{kv_heads} key/value heads cannot be split over {tp} ranks")
    divided = tp
    if (experts := spec.experts) is not None:
        divided = tp // experts.ep_size
        if experts.count < 2 or experts.count % experts.ep_size:
            raise config.error(
                f"moe: {experts.count} experts cannot be shared out over {experts.ep_size} ranks"
            )
        if spec.activation != "swiglu":
            raise config.error("hidden_act of experts must be swiglu")
        if spec.quantization.weights not in (None, "fp8"):
            raise config.error("experts with other weights than FP8 are unknown to the executor")
    if spec.intermediate_size % divided:
        raise config.error(
            f"intermediate_size {spec.intermediate_size} cannot be split over {divided} ranks"
        )
    if spec.embedding_split is not None and tp > 1:
        raise config.error("use_parallel_embedding is set: a split embedding is not supported")
