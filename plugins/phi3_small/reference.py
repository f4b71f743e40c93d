"""Phi-3-small in plain PyTorch, computing what the source's remote code computes.

transformers does not carry this architecture, and the code published beside the weights needs
remote execution, flash-attention, Triton and a GPU. ``Phi3SmallForCausalLM`` computes the same
function from the published math, reads the published directory as it is (config.json of model_type
"phi3small", safetensors with the published names and layouts) and runs wherever PyTorch does:

    model = Phi3SmallForCausalLM.from_pretrained(directory)
    model.generate(**tokenizer(prompt, return_tensors="pt"))

Conversions are verified against it, so it imports nothing of phireg but what references share.
Shapes: batch B, new tokens T, all tokens K = cached + T, heads H, key/value heads G, head size D.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from phireg_plugins.phi3_small.reference_config import Phi3SmallConfig
from phireg_plugins.reference import CausalLM
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Phi3SmallConfig", "Phi3SmallForCausalLM"]


def rotary_tables(
    config: Phi3SmallConfig, past: int, new: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [T, D] in ``dtype``, of the stored positions past ... past + new.

    Positions are storage indices: left padding counts, for the angle (where it cancels) and for
    the choice between the short and the long factors (where it does not).
    """
    work = torch.promote_types(dtype, torch.float32)
    positions = torch.arange(past, past + new, device=device, dtype=work)
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=work) / config.head_dim
    wavelengths = config.rope_embedding_base**exponents
    magnitude = 1.0
    if (long_rope := config.long_rope()) is None:
        positions = positions * config.rope_position_scale
    else:
        longer = past + new > long_rope.original_max_position_embeddings
        factors, magnitude = long_rope.long if longer else long_rope.short
        wavelengths = wavelengths * torch.tensor(factors, device=device, dtype=work)
    angles = torch.outer(positions, 1 / wavelengths).repeat(1, 2)
    return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, heads, T, D]: dimension i with dimension i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_masks(
    config: Phi3SmallConfig, real_tokens: Tensor | None, past: int, new: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Boolean masks (True: attend) of the dense and of the block-sparse layers.

    ``real_tokens`` [B, K] is zero for padding; None when there is none.

    Block-sparse: query i of head h attends to key j <= i when their blocks are closer than
    ``blocksparse_num_local_blocks``, or when key block + h * step + 1 is a multiple of
    ``blocksparse_vert_stride``; step is max(1, stride // H), or 0 when all heads share one pattern.
    i and j count from the sequence's first real token. A padding query attends to itself, so that
    its softmax is defined.

    Returns:
        The dense mask [B or 1, 1, T, K] and the sparse one [B or 1, H, T, K]; None stands for
        plain causal attention over exactly T keys, or over all keys when T is 1.
    """
    stored = torch.arange(past + new, device=device)
    queries = stored[past:, None]
    index, dense = stored[None], None
    if real_tokens is not None and not bool(real_tokens.all()):
        real = real_tokens.to(device=device, dtype=torch.bool)
        index = stored - real.int().argmax(dim=1, keepdim=True)
        dense = (real[:, None, None] & (stored <= queries)) | (stored == queries)
    elif past > 0 and new > 1:
        dense = (stored <= queries)[None, None]
    block_size, local = config.blocksparse_block_size, config.blocksparse_num_local_blocks
    if past + new <= block_size * local:
        return dense, dense  # everything is within the local window
    heads, stride = config.num_attention_heads, config.blocksparse_vert_stride
    step = 0 if config.blocksparse_homo_head_pattern else max(1, stride // heads)
    shift = torch.arange(heads, device=device)[:, None, None] * step + 1
    blocks = index.div(block_size, rounding_mode="floor")[:, None, None]
    near = blocks[..., past:].transpose(-1, -2) - blocks < local
    allowed = near | ((blocks + shift) % stride == 0)
    return dense, allowed & ((stored <= queries) if dense is None else dense)


def gegelu(x: Tensor, limit: float | None) -> Tensor:
    """Gated activation of [..., 2F] with alternating gate and linear entries, giving [..., F].

    The gate is clamped from above and the linear part on both sides, infinities excepted.
    """
    gate, linear = x[..., 0::2], x[..., 1::2]
    if limit is not None:
        gate = torch.where(gate.isinf(), gate, gate.clamp(max=limit))
        linear = torch.where(linear.isinf(), linear, linear.clamp(-limit, limit))
    return gate * torch.sigmoid(1.702 * gate) * (linear + 1)


class Shared(NamedTuple):
    """Values that all layers of one forward pass share."""

    cos: Tensor
    sin: Tensor
    dense_mask: Tensor | None
    sparse_mask: Tensor | None
    cache: Any  # transformers.Cache or None


class Phi3SmallAttention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention; rows of query_key_value are, per group, its queries, key, value."""

    def __init__(self, config: Phi3SmallConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_groups = config.num_key_value_heads
        self.queries_per_group = config.num_attention_heads // config.num_key_value_heads
        every = config.dense_attention_every_n_layers
        self.is_dense = bool(every) and (layer_idx + 1) % every == 0
        self.scale = self.head_dim**-0.5
        if config.mup_use_scaling:
            self.scale = config.mup_attn_multiplier / self.head_dim
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, rows)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """Attention output [B, T, hidden] of normalized hidden states of that shape."""
        cos, sin, dense_mask, sparse_mask, cache = shared
        group_shape = (self.num_groups, self.queries_per_group + 2, self.head_dim)
        grouped = self.query_key_value(x).unflatten(-1, group_shape)
        query = rotate(grouped[..., :-2, :].flatten(2, 3).transpose(1, 2), cos, sin)
        key = rotate(grouped[..., -2, :].transpose(1, 2), cos, sin)
        value = grouped[..., -1, :].transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key_states=key, value_states=value, layer_idx=self.layer_idx)
        mask = dense_mask if self.is_dense else sparse_mask
        context = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(self.queries_per_group, dim=1),
            value.repeat_interleave(self.queries_per_group, dim=1),
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            scale=self.scale,
        )
        return self.dense(context.transpose(1, 2).flatten(2))


class Phi3SmallMLP(nn.Module):  # type: ignore[misc]
    """up_proj, gegelu, down_proj."""

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__()
        self.limit = config.gegelu_limit
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """MLP output [B, T, hidden] of normalized hidden states of that shape."""
        return self.down_proj(gegelu(self.up_proj(x), self.limit))


class Phi3SmallDecoderLayer(nn.Module):  # type: ignore[misc]
    """Pre-norm attention and MLP, each with its residual, one after the other."""

    def __init__(self, config: Phi3SmallConfig, layer_idx: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_epsilon
        self.input_layernorm = nn.LayerNorm(size, eps=eps)
        self.self_attn = Phi3SmallAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(size, eps=eps)
        self.mlp = Phi3SmallMLP(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """Hidden states [B, T, hidden] after the layer."""
        x = x + self.self_attn(self.input_layernorm(x), shared)
        return x + self.mlp(self.post_attention_layernorm(x))


class Phi3SmallModel(nn.Module):  # type: ignore[misc]
    """Embedding, layers and final norm (the names under ``model.`` in the checkpoint)."""

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Phi3SmallDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: Any, keep_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The final norm's output [B, T, hidden]; if kept, also each layer's input before it."""
        past, new = 0 if cache is None else int(cache.get_seq_length()), input_ids.shape[1]
        needed = (len(input_ids), past + new)
        if attention_mask is not None and attention_mask.shape != needed:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not {needed}")
        x = self.embed_tokens(input_ids)
        if (multiplier := self.config.mup_embedding_multiplier) is not None and multiplier > 0:
            x = x * multiplier
        shared = Shared(
            *rotary_tables(self.config, past, new, x.device, x.dtype),
            *attention_masks(self.config, attention_mask, past, new, x.device),
            cache,
        )
        states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            states = (*states, x) if keep_states else ()
            x = layer(x, shared)
        x = self.final_layernorm(x)
        return x, (*states, x) if keep_states else None


class Phi3SmallForCausalLM(CausalLM):
    """The published Phi-3-small.

    Beyond the original length a cache must have been made beyond it too, with the long factors;
    ``generate`` sees to that: where a sequence grows beyond it the cache is recomputed.
    """

    config_class = Phi3SmallConfig
    _no_split_modules: ClassVar[list[str]] = ["Phi3SmallDecoderLayer"]
    # A mapping for transformers 5; transformers 4 reads only its keys.
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    # In the 8k files, and rounded to their dtype; computed here instead.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq$"]

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__(config)
        self.model = Phi3SmallModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, T, vocab_size] of the final norm's output [B, T, hidden]."""
        logits = super().logits(x)
        if self.config.mup_width_multiplier:
            logits = logits / self.config.mup_width_multiplier
        if dummies := self.config.masked_token_indices():
            logits[..., dummies] = torch.finfo(torch.float32).min
        return logits

    def is_outdated(self, past: int, length: int) -> bool:
        """Whether the tokens go beyond the original length, and the cache does not."""
        long_rope = self.config.long_rope()
        return bool(long_rope) and 0 < past <= long_rope.original_max_position_embeddings < length
