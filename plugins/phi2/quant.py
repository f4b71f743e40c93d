"""phi-2's quantized linears."""

from collections.abc import Mapping
from typing import Any

from phireg.api import QuantRules, hookimpl

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")


@hookimpl
def phireg_quant_rules(config: Mapping[str, Any]) -> QuantRules:
    """Every linear of every layer, whatever the scheme; exporters write phi-2's rows in order."""
    layers = range(config["num_hidden_layers"])
    return QuantRules(tuple(f"transformer.layers.{i}.{name}" for i in layers for name in LINEARS))
