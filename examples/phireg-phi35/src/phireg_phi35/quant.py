"""Phi-3.5-MoE is not quantized."""

from phireg.api import QuantRules, hookimpl


@hookimpl
def phireg_quant_rules() -> QuantRules:
    """No linears and no KV caches, so phireg refuses every scheme.

    Experts would need scales of their own, and calibration enough tokens for the least used one.
    """
    return QuantRules(linears=())
