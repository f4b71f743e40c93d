"""Phi-3.5-mini: Phi-3-mini with other rope factors, and with its demo model."""

from phireg_plugins.phi3_mini import variant

FAMILY = variant("phi3.5-mini", demo="phireg_plugins.phi3_mini:demo")
