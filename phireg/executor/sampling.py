"""How the next token is chosen from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phireg.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Greedy, or drawn at random.

    Attributes:
        temperature: the logits are divided by this; 0 takes the most likely token, always.
        top_k: draw among so many most likely tokens; 0 is all.
        top_p: of these, among the fewest that hold this probability together; 1 is all.
        seed: the same seed, batch and device draw the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: "
                "one is out of range",
                hint="temperature and top_k are 0 or more, top_p is above 0 and at most 1",
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def choose(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """The next token of every row, without leaving the device.

    Args:
        logits: float32 [batch, vocab_size].
        sampling: how to choose.
        noise: float32 [batch, vocab_size], drawn from the exponential distribution with mean 1;
            the largest p / noise is a token drawn with probability p. Unused when greedy.

    Returns:
        int64 [batch].
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probability = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the more likely tokens hold together
        kept = ordered.masked_fill(before >= sampling.top_p, 0)
        probability = torch.zeros_like(probability).scatter(-1, order, kept)
    return (probability / noise).argmax(dim=-1)
