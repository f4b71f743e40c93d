"""Phi-3's quantized linears."""

from collections.abc import Mapping
from typing import Any

from phireg.api import QuantRules, hookimpl

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")


@hookimpl
def phireg_quant_rules(config: Mapping[str, Any]) -> QuantRules:
    """Every linear of every layer, whatever the scheme; exporters write Phi-3's rows in order."""
    layers = [f"transformer.layers.{i}" for i in range(config["num_hidden_layers"])]
    return QuantRules(
        linears=tuple(f"{layer}.{name}" for layer in layers for name in LINEARS),
        kv_caches=tuple(f"{layer}.attention" for layer in layers),
    )
