"""Experts in an MLP's place: which two a token gets, and what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phireg.reader.fields import Config

ROUTER = "mlp.router.weight"

# TensorRT-LLM's number for choosing experts as sparse mixer does.
_SPARSE_MIXER = 2
# What the block may say besides, and the values with which it changes nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "tp_mode": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "device_limited_n_group": (None, 0),
    "device_limited_topk_group": (None, 0),
    "device_limited_routed_scaling_factor": (None, 1.0),
}
_KNOWN = {"num_experts", "top_k", "normalization_mode", "sparse_mixer_epsilon", *_INERT}


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of every layer.

    Attributes:
        count: how many a layer has, of all ranks together.
        epsilon: what sparse mixer compares scores by.
        ep_size: over how many ranks they are shared out. Rank r has the experts of share
            r mod ``ep_size``; the ranks with the same experts divide each of them.
    """

    count: int
    epsilon: float
    ep_size: int

    @property
    def rank_count(self) -> int:
        """Experts of one rank."""
        return self.count // self.ep_size

    def first(self, rank: int) -> int:
        """The number of a rank's first expert."""
        return rank % self.ep_size * self.rank_count


def parse_experts(config: Config, intermediate_size: int, tp_size: int) -> Experts:
    """Read ``moe`` and what ``mapping`` says about experts.

    Raises:
        CheckError: another way of choosing experts, or sizes that cannot be divided so.
    """
    block, mapping = config.block("moe"), config.block("mapping")
    for key, value in block.values.items():
        if key not in _KNOWN or value not in _INERT.get(key, (value,)):
            raise block.fail(f"{key} is {value!r}, which the executor has no meaning for")
    if block.get("normalization_mode") != _SPARSE_MIXER or block.integer("top_k") != 2:
        raise block.fail(
            f"normalization_mode {block.get('normalization_mode')!r} with top_k "
            f"{block.get('top_k')!r} is unknown to the executor",
            f"it knows mode {_SPARSE_MIXER}, sparse mixer, which chooses 2 experts",
        )
    ep_size = mapping.integer("moe_ep_size") if mapping.has("moe_ep_size") else 1
    divided = mapping.integer("moe_tp_size") if mapping.has("moe_tp_size") else tp_size // ep_size
    if divided * ep_size != tp_size:
        raise mapping.fail(f"moe_tp_size {divided} times moe_ep_size {ep_size} is not {tp_size}")
    experts = Experts(block.integer("num_experts"), block.positive("sparse_mixer_epsilon"), ep_size)
    if experts.count < 2 or experts.count % ep_size:
        raise block.fail(f"{experts.count} experts cannot be shared out over {ep_size} ranks")
    if intermediate_size % divided:
        raise config.fail(
            f"intermediate_size {intermediate_size} cannot be split over {divided} ranks"
        )
    return experts


def route(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, as sparse mixer chooses at inference.

    The weight of the best expert is its share in a softmax over those whose score is near the best
    one: (best - score) / max(|score|, best) is at most 2 epsilon. The second is the best of the
    others, and its weight the same among those others. The two weights do not add up to 1.

    Args:
        scores: float32 [tokens, experts].
        epsilon: half of what counts as near.

    Returns:
        int64 and float32 [tokens, 2].
    """
    chosen, weights = [], []
    left = scores
    for _ in range(2):
        best, expert = left.max(dim=-1, keepdim=True)
        distance = (best - scores) / torch.maximum(scores.abs(), best)
        near = left.masked_fill(distance > 2 * epsilon, -torch.inf)
        weights.append(near.softmax(dim=-1).gather(-1, expert))
        chosen.append(expert)
        left = left.scatter(-1, expert, -torch.inf)
    return torch.cat(chosen, dim=-1), torch.cat(weights, dim=-1)


def rank_mixture(
    first: int, fc: Tensor, proj: Tensor, x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """What one rank's experts add up to; the sum over all ranks is the layer's output.

    Args:
        first: the number of the rank's first expert.
        fc: [experts, 2 F, h], the rows [up; gate] of each.
        proj: [experts, h, F].
        x: [tokens, h].
        chosen: int64 [tokens, 2], see ``route``.
        weights: float32 [tokens, 2].

    Returns:
        As ``x``.
    """
    total = torch.zeros_like(x)
    for index in range(len(fc)):
        token, place = torch.nonzero(chosen == first + index, as_tuple=True)
        if not len(token):
            continue
        up, gate = functional.linear(x[token], fc[index]).chunk(2, dim=-1)
        made = functional.linear(functional.silu(gate) * up, proj[index])
        total.index_add_(0, token, (made * weights[token, place, None]).to(x.dtype))
    return total
