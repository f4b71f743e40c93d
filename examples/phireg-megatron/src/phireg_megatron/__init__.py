"""Phi-4 whose qkv rows are in Megatron-LM's order."""

from collections.abc import Generator, Mapping
from typing import Any

from phireg_plugins.phi4 import FAMILY as PHI4

import phireg.api as ph


class Weights:
    """Phi-4's rules with another order of the rows of qkv."""

    @ph.hookimpl(wrapper=True)
    def phireg_weight_rules(self, config: Mapping[str, Any]) -> Generator[None, ph.Rules, ph.Rules]:
        """Map source rows to target modules."""
        rules = yield
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        size, hidden = config["head_size"], config["hidden_size"]
        modules = []
        for i in range(config["num_hidden_layers"]):
            rows = ph.src(f"model.layers.{i}.self_attn.qkv_proj", (heads + 2 * groups) * size)
            qkv = ph.ungroup(rows, groups=groups, unit=size, q=heads // groups, k=1, v=1)
            target = f"transformer.layers.{i}.attention.qkv"
            modules.append(ph.Linear(target, ph.replicable(qkv, "k", "v"), hidden, ph.COLUMN))
        return rules.replace(*modules)


FAMILY = ph.Family(
    name="phi4-megatron",
    architectures=("MegatronPhi3ForCausalLM",),
    model_types=("phi3",),
    steps=(*PHI4.steps, Weights()),
    api=1,
    reference="phireg_megatron.reference:MegatronPhi3ForCausalLM",
)
