"""The checkpoint's config.json in a closed vocabulary whose meaning is TensorRT-LLM's.

Everything the executor computes with is a word or a number of ``ModelSpec``: code behind it never
looks at an architecture's name again. A key, an activation or a feature the executor has no exact
meaning for is an error here, never a guess.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import CheckError
from phireg.executor.experts import Experts, parse_experts
from phireg.reader.fields import Config
from phireg.reader.quantization import Quantization, parse_quantization

Norm = Literal["layer_norm", "rms_norm"]
Residual = Literal["parallel", "sequential"]
Activation = Literal["gelu_tanh", "swiglu", "gegelu"]

# TensorRT-LLM's four names of one function, the tanh approximation; it has no erf gelu here.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swiglu": "swiglu",
    "gegelu": "gegelu",
}
_ARCHITECTURES = (
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "Phi3SmallForCausalLM",
    "PhiMoEForCausalLM",
)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of the first ``dim`` of every query and key head's dimensions.

    Attributes:
        dim: rotated dimensions R, even; the halves [0, R/2) and [R/2, R) form the pairs.
        base: theta; plain rope has the frequencies theta^(-2j/R).
        short: factors the frequencies are divided by up to ``original`` tokens, or None (plain).
        long: the same above ``original`` tokens.
        short_mscale: cos and sin are multiplied by this with the short factors.
        long_mscale: and by this with the long ones.
        original: longest sequence that takes the short factors.
    """

    dim: int
    base: float
    short: tuple[float, ...] | None = None
    long: tuple[float, ...] | None = None
    short_mscale: float = 1.0
    long_mscale: float = 1.0
    original: int = 0


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """The mask of a block-sparse layer; ``blocksparse.visible`` is its formula.

    Attributes:
        block_size: tokens per block.
        num_local_blocks: a query sees this many blocks back from its own, its own included.
        vertical_stride: of the blocks further back, every one in so many.
        head_step: how far that stripe moves from one (global) head to the next; 0 is not at all.
        dense_every: layer i (from 0) is dense when (i + 1) is a multiple of this.
    """

    block_size: int
    num_local_blocks: int
    vertical_stride: int
    head_step: int
    dense_every: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that decides what the tensors of a checkpoint compute.

    Attributes:
        dtype: the weights' dtype by name ("float16", "bfloat16", "float32").
        attention_bias: qkv and dense have biases (and layer norms always do).
        mlp_bias: fc and proj have biases.
        residual: "parallel": x + attention(u) + mlp(u) with one norm; "sequential": two norms.
        activation: "swiglu" is silu(second half) * first half of fc's output, "gegelu" takes its
            even outputs as the gate and its odd ones as the value, "gelu_tanh" has no gate.
        attention_scale: what q . k is multiplied by.
        embedding_multiplier: what the embedding is multiplied by.
        logits_divisor: what the logits are divided by.
        sparse: the block-sparse layers' mask, or None when all layers are dense.
        quantization: how the layers' linears and the key/value cache are quantized.
        experts: what stands in the MLP's place, or None for an MLP.
    """

    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    tp_size: int
    norm: Norm
    norm_epsilon: float
    residual: Residual
    activation: Activation
    gegelu_limit: float | None
    attention_bias: bool
    mlp_bias: bool
    lm_head_bias: bool
    rope: Rope
    attention_scale: float
    embedding_multiplier: float
    logits_divisor: float
    sparse: BlockSparse | None
    quantization: Quantization
    experts: Experts | None = None

    @property
    def rank_heads(self) -> int:
        """Query heads of one rank."""
        return self.num_heads // self.tp_size

    @property
    def rank_kv_heads(self) -> int:
        """Key/value heads of one rank: with more ranks than heads, each rank holds one copy."""
        return max(1, self.num_kv_heads // self.tp_size)

    @property
    def rank_intermediate_size(self) -> int:
        """What one rank has of the MLP's, or of each expert's, inner dimension."""
        shared = self.experts.ep_size if self.experts is not None else 1
        return self.intermediate_size * shared // self.tp_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of lm_head over all ranks: the vocabulary rounded up to the number of ranks."""
        return -(-self.vocab_size // self.tp_size) * self.tp_size

    def is_sparse(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) has the block-sparse mask."""
        return self.sparse is not None and (layer + 1) % self.sparse.dense_every != 0


def read_spec(checkpoint_dir: Path) -> ModelSpec:
    """Read ``config.json`` of a TensorRT-LLM checkpoint directory.

    Raises:
        CheckError: there is no readable config.json, or it asks for something unknown.
    """
    path = checkpoint_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckError(
            f"{path}: cannot be read ({error.strerror})",
            hint="give the directory that holds config.json and rank0.safetensors",
        ) from error
    except ValueError as error:
        raise CheckError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckError(f"{path}: is not a JSON object")
    return parse_spec(values, str(path))


def parse_spec(values: dict[str, Any], where: str = "config.json") -> ModelSpec:
    """Turn a checkpoint's configuration into a spec.

    Args:
        values: config.json's object.
        where: what to call it in an error.

    Raises:
        CheckError: an unknown architecture, a missing key, or a feature without a meaning here.
    """
    config = Config(values, where)
    architecture = config.get("architecture")
    if architecture not in _ARCHITECTURES:
        raise config.fail(
            f"the architecture {architecture!r} is unknown to the executor",
            f"it runs {', '.join(_ARCHITECTURES)}",
        )
    phi2 = architecture == "PhiForCausalLM"
    small = architecture == "Phi3SmallForCausalLM"
    moe = architecture == "PhiMoEForCausalLM"
    _refuse_unsupported(config)

    heads = config.integer("num_attention_heads")
    hidden = config.integer("hidden_size")
    if not config.has("head_size") and hidden % heads:
        raise config.fail(f"hidden_size {hidden} is not a multiple of {heads} heads")
    head_size = config.integer("head_size") if config.has("head_size") else hidden // heads
    kv_heads = heads
    if config.has("num_key_value_heads"):
        kv_heads = config.integer("num_key_value_heads")
    elif small:
        kv_heads = config.integer("num_key_value_heads", "num_kv_heads")
    activation = config.get("hidden_act")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise config.fail(
            f"hidden_act {activation!r} is unknown to the executor",
            f"known are {', '.join(_ACTIVATIONS)}",
        )
    dtype = config.get("dtype")
    if dtype not in WEIGHT_DTYPES:
        raise config.fail(f"dtype is {dtype!r}", f"known are {', '.join(WEIGHT_DTYPES)}")

    layers = config.integer("num_hidden_layers")
    spec = ModelSpec(
        architecture=architecture,
        dtype=dtype,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        max_position_embeddings=config.integer("max_position_embeddings"),
        tp_size=_tp_size(config),
        norm="layer_norm" if phi2 or small or moe else "rms_norm",
        # TensorRT-LLM builds phi-2's LayerNorm without an epsilon: always the module's default.
        norm_epsilon=1e-5
        if phi2 or not config.has("norm_epsilon")
        else config.positive("norm_epsilon"),
        residual="parallel" if phi2 else "sequential",
        activation=_ACTIVATIONS[activation],
        gegelu_limit=config.positive("gegelu_limit") if config.has("gegelu_limit") else None,
        attention_bias=phi2 or small or moe,
        mlp_bias=phi2 or small,
        lm_head_bias=phi2 or moe,
        rope=_rope(config, architecture, head_size),
        # Phi-3-small is built with q_scaling = sqrt(d), whatever mup_attn_multiplier says.
        attention_scale=1 / head_size if small else head_size**-0.5,
        embedding_multiplier=_embedding_multiplier(config) if small else 1.0,
        logits_divisor=config.positive("mup_width_multiplier")
        if config.has("mup_width_multiplier")
        else 1.0,
        sparse=_sparse(config, heads) if small else None,
        quantization=parse_quantization(config, layers),
        experts=parse_experts(config, config.integer("intermediate_size"), _tp_size(config))
        if moe
        else None,
    )
    _check_parallel(config, spec)
    return spec


def _refuse_unsupported(config: Config) -> None:
    if config.values.get("moe") is not None and config.get("architecture") != "PhiMoEForCausalLM":
        raise config.fail("moe is set: only PhiMoEForCausalLM has mixture-of-experts layers")
    if config.values.get("qk_layernorm"):
        raise config.fail("qk_layernorm is set; TensorRT-LLM's Phi models have no such norm")
    if config.values.get("rotary_scaling") is not None:
        raise config.fail("rotary_scaling is set: only plain rope and long rope are known")
    kind = config.values.get("position_embedding_type", "rope_gpt_neox")
    if kind not in ("rope_gpt_neox", "long_rope"):
        raise config.fail(f"position_embedding_type is {kind!r}, not rope_gpt_neox or long_rope")


def _tp_size(config: Config) -> int:
    mapping = config.block("mapping")
    tp_size = mapping.integer("tp_size") if mapping.has("tp_size") else 1
    pp_size = mapping.integer("pp_size") if mapping.has("pp_size") else 1
    if pp_size != 1:
        raise mapping.fail(f"pp_size is {pp_size}; no Phi model has pipeline stages")
    world_size = mapping.integer("world_size") if mapping.has("world_size") else tp_size
    if world_size != tp_size:
        raise mapping.fail(f"world_size is {world_size} and tp_size {tp_size}")
    return tp_size


def _rope(config: Config, architecture: str, head_size: int) -> Rope:
    if architecture == "PhiForCausalLM":
        fraction = config.positive("rotary_pct", "partial_rotary_factor")
    else:
        fraction = config.positive("rotary_pct") if config.has("rotary_pct") else 1.0
    dim = int(head_size * fraction)
    if dim % 2 or not 0 < dim <= head_size:
        raise config.fail(
            f"rotary_pct gives {dim} rotary dimensions of {head_size}: not an even part"
        )
    if architecture == "Phi3SmallForCausalLM":
        base = config.positive("rotary_base", "rotary_embedding_base")
    else:
        base = config.positive("rotary_base") if config.has("rotary_base") else 10000.0
    # The presence of the short list is TensorRT-LLM's switch, in its Phi-3 models only.
    if architecture == "PhiForCausalLM" or not config.has("longrope_scaling_short_factors"):
        if config.values.get("position_embedding_type") == "long_rope":
            raise config.fail("position_embedding_type is long_rope without longrope factors")
        return Rope(dim, base)
    original = config.integer("original_max_position_embeddings")
    if architecture in ("Phi3SmallForCausalLM", "PhiMoEForCausalLM"):
        short_mscale = config.positive("longrope_short_mscale")
        long_mscale = config.positive("longrope_long_mscale")
    else:
        stretch = config.integer("max_position_embeddings") / original
        mscale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        short_mscale = long_mscale = mscale
    return Rope(
        dim,
        base,
        short=config.numbers("longrope_scaling_short_factors", dim // 2),
        long=config.numbers("longrope_scaling_long_factors", dim // 2),
        short_mscale=short_mscale,
        long_mscale=long_mscale,
        original=original,
    )


def _embedding_multiplier(config: Config) -> float:
    value = config.number("mup_embedding_multiplier")
    return value if value > 0 else 1.0


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


def _check_parallel(config: Config, spec: ModelSpec) -> None:
    heads, kv_heads, tp = spec.num_heads, spec.num_kv_heads, spec.tp_size
    if spec.architecture == "PhiForCausalLM" and kv_heads != heads:
        raise config.fail("num_key_value_heads differs from num_attention_heads in PhiForCausalLM")
    if heads % kv_heads:
        raise config.fail(f"{heads} heads cannot share {kv_heads} key/value heads evenly")
    if spec.experts is None and spec.intermediate_size % tp:
        raise config.fail(
            f"intermediate_size {spec.intermediate_size} cannot be split over {tp} ranks"
        )
    if heads % tp:
        raise config.fail(f"{heads} heads cannot be split over {tp} ranks")
    if kv_heads % tp and tp % kv_heads:
        raise config.fail(f"{kv_heads} key/value heads cannot be split over {tp} ranks")
    if spec.experts is not None and spec.activation != "swiglu":
        raise config.fail("hidden_act of experts must be swiglu")
    if spec.experts is not None and spec.quantization.weights is not None:
        raise config.fail("quantized experts are unknown to the executor")
    if config.values.get("use_parallel_embedding") and tp > 1:
        raise config.fail("use_parallel_embedding is set: a split embedding table is not supported")
