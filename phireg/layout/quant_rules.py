"""What a family says about quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phireg.layout.rules import Rules


@dataclass(frozen=True, slots=True)
class QuantRules:
    """The answer to ``phireg_quant_rules``.

    Attributes:
        linears: target modules the scheme quantizes; everything else stays in the checkpoint's
            dtype.
        kv_caches: target attention modules that hold a KV cache, one per layer and in the order of
            the layers.
        exclude_modules: patterns TensorRT-LLM's reader must leave alone. A list given to the
            reader replaces its own defaults, so it must name the embedding as well as the head:
            with ``lm_head`` alone, weight-only readers would also quantize the embedding.
        postprocess: modules that an exporter may have written in the source's row order, as rules
            from such a checkpoint to a right one (target and source are both checkpoint names).
        notes: what a user of the scheme should know about it, a sentence each.
    """

    linears: tuple[str, ...]
    kv_caches: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ("lm_head", "*vocab_embedding")
    postprocess: Rules = field(default_factory=Rules)
    notes: tuple[str, ...] = ()


def every_linear(
    config: Mapping[str, Any], *, postprocess: Rules | None = None, notes: tuple[str, ...] = ()
) -> QuantRules:
    """Quantize the four linears and the KV cache of every layer (decoders without experts)."""
    layers = [f"transformer.layers.{i}" for i in range(config["num_hidden_layers"])]
    linears = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    return QuantRules(
        linears=tuple(f"{layer}.{linear}" for layer in layers for linear in linears),
        kv_caches=tuple(f"{layer}.attention" for layer in layers),
        postprocess=postprocess or Rules(),
        notes=notes,
    )
