"""Phi-4-mini and its reasoning model: a tied head, partly rotated heads, long rope."""

from phireg_plugins.phi3_mini import variant

FAMILY = variant("phi4-mini", demo="phireg_plugins.phi4_mini:demo")
