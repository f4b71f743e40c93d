"""The hooks a family implements, and the API number plugins are written against.

Each hook returns immutable data and touches no tensor; what a hook cannot see, it cannot break.
A new piece of information is added as a new named argument: implementations may take fewer
arguments than the specification, so that is compatible. Anything else raises ``API``.

History: API 1 (phireg 0.1) has the three hooks below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

from phireg.config.fields import FieldTable
from phireg.config.hf import HFConfig
from phireg.layout.rules import Rules
from phireg.quant.rules import QuantRules

API = 1
"""The hook API this phireg speaks; a plugin states the number it was written against."""

PROJECT = "phireg"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Steps:
    """What a family must say."""

    @hookspec(firstresult=True)
    def phireg_config_fields(self) -> FieldTable:
        """How the source config.json becomes the checkpoint's config.json."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def phireg_weight_rules(self, config: Mapping[str, Any], hf: HFConfig) -> Rules:
        """Where the rows of each target module come from.

        Args:
            config: the translated fields, by TensorRT-LLM's names (``hidden_size``,
                ``num_key_value_heads``, ``head_size``, ``intermediate_size``, ...).
            hf: the source config, for what has no counterpart there.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def phireg_quant_rules(self, config: Mapping[str, Any], scheme: str) -> QuantRules:
        """Which linears a quantization scheme covers, and how an exported checkpoint is mended.

        Args:
            config: the translated fields.
            scheme: TensorRT-LLM's ``quant_algo``, e.g. ``FP8`` or ``W8A16``.
        """
        raise NotImplementedError
