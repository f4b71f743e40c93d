"""Tiny models whose long rope switches at 20 tokens and whose block-sparse window is 8."""

from helpers.tiny_models import phi2, phi3, phi3_small, randomize

import phireg

MAKERS = {
    "phi2": lambda: phi2(num_attention_heads=4),
    "phi3-mini": lambda: phi3(long=20),
    "phi3-small": lambda: phi3_small(long=20),
    "phi3-medium": lambda: phi3(num_key_value_heads=2),
}
"""By family."""


def convert(family, directory):
    """Write a family's source and its float32 checkpoint, and return the checkpoint."""
    randomize(MAKERS[family](), 2.5).save_pretrained(directory / "source")
    plan = phireg.plan(directory / "source", family=family, dtype="float32")
    phireg.convert(plan, directory / "checkpoint")
    return directory / "checkpoint"
