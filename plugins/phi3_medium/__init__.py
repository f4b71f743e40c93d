"""Phi-3-medium: Phi-3-mini's mapping, which allows shared KV heads."""

from phireg_plugins.phi3_mini import variant

FAMILY = variant("phi3-medium", demo="phireg_plugins.phi3_medium:demo")
