"""Phi-4 and its reasoning models: Phi-3-medium with another rope base and vocabulary."""

from phireg_plugins.phi3_mini import variant

FAMILY = variant("phi4", demo="phireg_plugins.phi4:demo")
