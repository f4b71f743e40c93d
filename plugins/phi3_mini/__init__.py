"""Phi-3-mini, the base of its architecture: RMSNorm, fused qkv and gate/up, no biases."""

from phireg_plugins.phi3_mini import config, models, weights

import phireg.api as ph

FAMILY = ph.Family(
    name="phi3-mini",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    steps=(config, weights),
    api=1,
    tell_apart=models.teller("phi3-mini"),
    published=models.published("phi3-mini"),
    demo="phireg_plugins.phi3_mini:demo",
)


def variant(name: str, *, demo: str | None = None) -> ph.Family:
    """Return the family of other published models of the architecture."""
    return FAMILY.derive(
        name, tell_apart=models.teller(name), published=models.published(name), demo=demo
    )
