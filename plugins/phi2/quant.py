"""phi-2's quantized linears."""

from collections.abc import Mapping
from typing import Any

from phireg.api import QuantRules, hookimpl

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
WEIGHT_ONLY = ("W8A16", "W4A16")


@hookimpl
def phireg_quant_rules(config: Mapping[str, Any], scheme: str) -> QuantRules:
    """Every linear of every layer, whatever the scheme; exporters write phi-2's rows in order."""
    layers = [f"transformer.layers.{i}" for i in range(config["num_hidden_layers"])]
    note = (
        f"TensorRT-LLM's reader takes {scheme} for phi-2, but its support matrix does not list it "
        "and its own quantize script cannot make it"
    )
    return QuantRules(
        linears=tuple(f"{layer}.{name}" for layer in layers for name in LINEARS),
        kv_caches=tuple(f"{layer}.attention" for layer in layers),
        notes=() if scheme in WEIGHT_ONLY else (note,),
    )
