"""What the reference models of several families have in common: their configs and their outputs.

It imports nothing of phireg, whose conversions are compared with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers' name for the cache in its models' inputs and outputs.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def own_values(kwargs: dict[str, Any], defaults: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Take a config's own keys out of ``kwargs``, with ``defaults`` for those that are absent.

    transformers 5's ``rope_parameters`` is taken for ``rope_scaling``, which is None for plain
    rope, and for the key ``base`` of the rotary base.
    """
    own = {key: kwargs.pop(key, default) for key, default in defaults.items()}
    if (parameters := kwargs.pop("rope_parameters", None)) is not None:
        own["rope_scaling"] = own["rope_scaling"] or parameters
        own[base] = parameters.get("rope_theta", own[base])
    if rope_type(own["rope_scaling"] or {}) == "default":
        own["rope_scaling"] = None
    return own


def rope_type(scaling: Mapping[str, Any]) -> str:
    """Return the type that a rope block names, ``default`` if none."""
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


class CausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A decoder ``model`` and ``lm_head``, with transformers' loading, saving and ``generate``.

    Linears and norms have the checkpoint's names, so hooks and recording caches see what they see
    in transformers' own models: ``cache.update`` gets ``key_states`` (after rotation),
    ``value_states`` and ``layer_idx`` by keyword. The decoder takes token ids [B, T], the mask
    [B, cached + T], the cache, and whether to keep each layer's input [B, T, hidden]; it returns
    the final norm's output of that shape, and those inputs with it or None.
    """

    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_cache_class = True  # asked for by transformers 4

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The output projection, which may share the token embedding's weight."""
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, T, vocab_size] of the final norm's output [B, T, hidden]."""
        logits = self.lm_head(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def is_outdated(self, past: int, length: int) -> bool:
        """Whether ``past`` cached tokens cannot be continued to ``length``."""
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        cache: Any = None,
    ) -> Any:
        """Logits [B, T, vocab_size] of ``input_ids`` [B, T], float32 (float64 in a float64 model).

        Arguments mean what they mean in transformers' own models, and:

        ``attention_mask`` [B, cached + T] is zero for padding and never moves positions; another
        shape raises ValueError. ``cache`` is today's name of ``past_key_values``. Its keys keep the
        long-rope factors they were rotated with. ``logits_to_keep`` asks for the last positions
        only; 0 for all.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x, states = self.model(input_ids, attention_mask, cache, output_hidden_states)
        logits = self.logits(x[:, -logits_to_keep:])
        output = CausalLMOutputWithPast(logits=logits, hidden_states=states, **{_CACHE: cache})
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        cache: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Inputs of one generation step: the tokens the cache does not hold yet."""
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else int(cache.get_seq_length())
        if self.is_outdated(past, input_ids.shape[1]):
            past, cache = 0, DynamicCache()
        return {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            _CACHE: cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
