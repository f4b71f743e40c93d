"""Phi-3.5-MoE in plain PyTorch: what the source computes, beyond the original length too.

transformers 5 has a class for it, but it renames the published tensors and stays with the short
rope factors for long sequences; versions before it name the parts of a layer otherwise. This one
has the published names and is the witness that ``phireg verify`` compares with. It uses nothing of
phireg but what references share.
Shapes: batch B, new tokens T, all tokens K = cached + T, heads H, key/value heads G.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from phireg_plugins.reference import CausalLM, own_values
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

# An absent key has the source class's value.
# fmt: off
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "rope_scaling": None,
    "num_local_experts": 16, "num_experts_per_tok": 2, "router_jitter_noise": 0.01,
    "attention_bias": False, "lm_head_bias": False, "initializer_range": 0.02,
    "tie_word_embeddings": False, "use_cache": True,
}
# fmt: on


class PhiMoEConfig(PretrainedConfig):  # type: ignore[misc]
    """config.json of Phi-3.5-MoE, as published and as transformers 4 or 5 saves it."""

    model_type = "phimoe_as_published"
    # transformers 5 makes rope_scaling an alias of rope_parameters; this one stays what it is.
    rope_scaling = None

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        own = own_values(kwargs, _DEFAULTS, "rope_theta")
        super().__init__(**kwargs)
        for key, value in own.items():  # after the base class, which has defaults of its own
            setattr(self, key, value)

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return int(self.hidden_size // self.num_attention_heads)


def rotary_tables(config: PhiMoEConfig, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head size / 2] of the first positions, float32."""
    pair = torch.arange(0, config.head_size, 2, device=x.device, dtype=torch.float32)
    wavelengths = config.rope_theta ** (pair / config.head_size)
    magnitude = 1.0
    if config.rope_scaling is not None:
        original = config.rope_scaling.get("original_max_position_embeddings")
        longer = length > (original or config.original_max_position_embeddings)
        kind = "long" if longer else "short"
        factors = config.rope_scaling[f"{kind}_factor"]
        wavelengths = wavelengths * torch.tensor(factors, device=x.device, dtype=torch.float32)
        magnitude = config.rope_scaling[f"{kind}_mscale"]
    angles = torch.arange(length, device=x.device)[:, None] / wavelengths
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, heads, T, D]: dimension i with dimension i + D/2."""
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


class Shared(NamedTuple):
    """What all layers of one forward share."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    cache: Any  # transformers.Cache or None


class PhiMoEAttention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention with biases."""

    def __init__(self, config: PhiMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_size = config.head_size
        self.group = config.num_attention_heads // config.num_key_value_heads
        width = config.num_attention_heads * self.head_size
        shared = config.num_key_value_heads * self.head_size
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """Attention output [B, T, hidden] of normalized hidden states of that shape."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in projected
        )
        query, key = (rotate(part, shared.cos, shared.sin) for part in (query, key))
        if shared.cache is not None:
            key, value = shared.cache.update(
                key_states=key, value_states=value, layer_idx=self.layer_idx
            )
        context = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(self.group, dim=1),
            value.repeat_interleave(self.group, dim=1),
            attn_mask=shared.mask,
            is_causal=shared.mask is None and x.shape[1] > 1,
        )
        return self.o_proj(context.transpose(1, 2).flatten(2))


class PhiMoEExpert(nn.Module):  # type: ignore[misc]
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: PhiMoEConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to the same shape."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


def share(scores: Tensor, candidates: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The best candidate of each token and its softmax share among the candidates near it.

    Near are those with (best - score) / max(|score|, best) of the threshold at most.
    """
    best = scores.masked_fill(~candidates, -torch.inf).max(dim=-1, keepdim=True)
    scale = torch.maximum(scores.abs(), best.values)
    near = candidates & ((best.values - scores) / scale <= threshold)
    shares = scores.masked_fill(~near, -torch.inf).softmax(dim=-1)
    return best.indices, shares.gather(-1, best.indices)


class PhiMoESparseBlock(nn.Module):  # type: ignore[misc]
    """Each token's two experts, weighted as sparse mixer does at inference; not renormalized."""

    def __init__(self, config: PhiMoEConfig) -> None:
        super().__init__()
        self.threshold = 2 * config.router_jitter_noise
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(PhiMoEExpert(config) for _ in range(config.num_local_experts))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to the same shape."""
        tokens = x.flatten(0, 1)
        scores = self.gate(tokens)
        every = torch.ones_like(scores, dtype=torch.bool)
        first, first_share = share(scores, every, self.threshold)
        second, second_share = share(scores, every.scatter(-1, first, False), self.threshold)
        shares = torch.zeros_like(scores)
        shares = shares.scatter(-1, first, first_share).scatter(-1, second, second_share)
        chosen = torch.zeros_like(every).scatter(-1, first, True).scatter(-1, second, True)
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = chosen[:, number]
            if mine.any():
                total[mine] += shares[mine, number, None] * expert(tokens[mine])
        return total.view_as(x)


class PhiMoEDecoderLayer(nn.Module):  # type: ignore[misc]
    """Pre-norm attention and experts, each with its residual, one after the other."""

    def __init__(self, config: PhiMoEConfig, layer_idx: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.LayerNorm(size, eps=eps)
        self.self_attn = PhiMoEAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(size, eps=eps)
        self.block_sparse_moe = PhiMoESparseBlock(config)

    @property
    def mlp(self) -> nn.Module:
        """The name that watchers know a layer's second part by."""
        return self.block_sparse_moe

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """Hidden states [B, T, hidden] after the layer."""
        x = x + self.self_attn(self.input_layernorm(x), shared)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class PhiMoEModel(nn.Module):  # type: ignore[misc]
    """Embedding, layers and final norm (the names under ``model.`` in the checkpoint)."""

    def __init__(self, config: PhiMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            PhiMoEDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, real_tokens: Tensor | None, cache: Any, keep_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The final norm's output; ``real_tokens`` [B, K] is zero for padding. See CausalLM."""
        past = 0 if cache is None else int(cache.get_seq_length())
        length = past + input_ids.shape[1]
        if real_tokens is not None and real_tokens.shape != (len(input_ids), length):
            raise ValueError(f"attention_mask is {tuple(real_tokens.shape)}, not [B, {length}]")
        x = self.embed_tokens(input_ids)
        cos, sin = rotary_tables(self.config, length, x)
        mask = None
        stored = torch.arange(length, device=x.device)
        if real_tokens is not None and not bool(real_tokens.all()):
            real = real_tokens.to(x.device, torch.bool)[:, None, None]
            # A padding query, which nobody reads, attends to itself: its softmax must be defined.
            queries = stored[past:, None]
            mask = (real & (stored <= queries)) | (stored == queries)
        elif past and input_ids.shape[1] > 1:
            mask = stored <= stored[past:, None]
        shared = Shared(cos[past:], sin[past:], mask, cache)
        states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            states = (*states, x) if keep_states else ()
            x = layer(x, shared)
        x = self.norm(x)
        return x, (*states, x) if keep_states else None


class PhiMoEForCausalLM(CausalLM):
    """The published Phi-3.5-MoE."""

    config_class = PhiMoEConfig

    def __init__(self, config: PhiMoEConfig) -> None:
        super().__init__(config)
        self.model = PhiMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()
