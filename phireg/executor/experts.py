"""A mixture of experts: which two a token gets, and what they compute."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def route(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return each token's experts and their weights, as sparse mixer chooses at inference.

    The weight of the best expert is its share in a softmax over those whose score is near the best
    one: (best - score) / max(|score|, best) is at most 2 epsilon. The second is the best of the
    others, and its weight the same among those others. The two weights do not add up to 1.

    Args:
        scores: float32 [tokens, experts].
        epsilon: half of the distance that counts as near.

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
    """Return the sum over one rank's experts; the sum over all ranks is the layer's output.

    Args:
        first: the number of the rank's first expert.
        fc: [experts, 2 F, h], the rows [up; gate] of each.
        proj: [experts, h, F].
        x: [tokens, h].
        chosen: int64 [tokens, 2], see ``route``.
        weights: float32 [tokens, 2].
    """
    total = torch.zeros_like(x)
    for index in range(len(fc)):
        token, place = torch.nonzero(chosen == first + index, as_tuple=True)
        if not len(token):
            continue
        up, gate = functional.linear(x[token], fc[index]).chunk(2, dim=-1)
        output = functional.linear(functional.silu(gate) * up, proj[index])
        total.index_add_(0, token, (output * weights[token, place, None]).to(x.dtype))
    return total
