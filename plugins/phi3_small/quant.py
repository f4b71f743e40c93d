"""Phi-3-small's quantized linears, and the mending of checkpoints from early exporters."""

from collections.abc import Mapping
from typing import Any

from phireg_plugins.phi3_small.weights import grouped_qkv

from phireg.api import COLUMN, Linear, QuantRules, Rules, hookimpl

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")


@hookimpl
def phireg_quant_rules(config: Mapping[str, Any]) -> QuantRules:
    """Every linear of every layer, whatever the scheme.

    Exporters of TensorRT-LLM's 0.11 development line left qkv in the source's grouped order;
    ``postprocess`` regroups the rows of such a checkpoint.
    """
    layers = [f"transformer.layers.{i}" for i in range(config["num_hidden_layers"])]
    qkv = [f"{layer}.attention.qkv" for layer in layers]
    return QuantRules(
        linears=tuple(f"{layer}.{name}" for layer in layers for name in LINEARS),
        kv_caches=tuple(f"{layer}.attention" for layer in layers),
        postprocess=Rules(
            *(
                Linear(name, grouped_qkv(name, config), config["hidden_size"], COLUMN, bias=True)
                for name in qkv
            )
        ),
    )
