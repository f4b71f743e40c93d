"""The ranges of whole numbers that others give, by name; checked before a number is used.

They leave room for models far larger than any that is known. Without them a damaged or made-up
file would keep a loop running, or fill the memory.
"""

from __future__ import annotations

from types import MappingProxyType

_RANKS = 1024

LARGEST = MappingProxyType(
    {
        "num_hidden_layers": 2**10,
        "hidden_size": 2**20,
        "intermediate_size": 2**24,
        "num_attention_heads": 2**12,
        "num_key_value_heads": 2**12,
        "head_size": 2**16,
        "vocab_size": 2**24,
        "num_experts": 2**12,
        "world_size": _RANKS,
        "tp_size": _RANKS,
        "pp_size": _RANKS,
        "moe_tp_size": _RANKS,
        "moe_ep_size": _RANKS,
        "max_batch_size": 2**20,
        "max_beam_width": 2**16,
    }
)
"""Largest value by the name of a config key or option; ``largest`` has that of the others."""


def largest(name: str) -> int:
    """Return the largest value of a number: positions, lengths and counts fit into 28 bits."""
    return LARGEST.get(name, 2**28)
