"""transformers' Phi-3 with the rows of qkv in Megatron-LM's order."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM


class GroupedLinear(nn.Linear):  # type: ignore[misc]
    """A linear whose outputs are grouped by KV head, and given as all queries, keys and values."""

    def __init__(self, plain: nn.Linear, groups: int, size: int) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.groups, self.size = groups, size

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., queries + keys + values]."""
        heads = super().forward(x).unflatten(-1, (self.groups, -1, self.size))
        queries, keys, values = heads.split([heads.shape[-2] - 2, 1, 1], dim=-2)
        return torch.cat([part.flatten(-3) for part in (queries, keys, values)], dim=-1)


class MegatronPhi3ForCausalLM(Phi3ForCausalLM):  # type: ignore[misc]
    """Phi-4 as the training code saves it."""

    config_class = Phi3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size // config.num_attention_heads
        for layer in self.model.layers:
            plain = layer.self_attn.qkv_proj
            layer.self_attn.qkv_proj = GroupedLinear(plain, config.num_key_value_heads, size)
