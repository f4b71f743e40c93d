"""The hooks a family implements, and the API number plugins are written against.

Each hook returns immutable data and touches no tensor; what a hook cannot see, it cannot break.
A plugin states the number it was written against, and phireg refuses any other.

Some changes keep the number, because no plugin can notice them: a hook is given a new argument
(implementations may take fewer arguments than the specification), a hook comes that families need
not implement, ``phireg.api`` gets a new word, a word gets a new optional argument.

Anything else raises ``API`` by one: a hook, an argument or a word that goes or means something
else. It is deprecated first: for at least one minor release of phireg it still works as before,
using it warns (``DeprecationWarning``, which pytest shows) and says what takes its place, and the
changelog and the history below name it.

History: API 1 (phireg 0.1) has three hooks, ``phireg_config_fields``, ``phireg_weight_rules`` and
``phireg_quant_rules``. Nothing is deprecated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

from phireg.config.fields import FieldTable
from phireg.config.hf import HFConfig
from phireg.layout.quant_rules import QuantRules
from phireg.layout.rules import Rules

API = 1
"""The hook API this phireg speaks; a plugin states the number it was written against."""

PROJECT = "phireg"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function as the implementation of the hook it is named after.

``@hookimpl`` answers the hook; in a derived family the answer takes the place of the base's.
``@hookimpl(wrapper=True)`` is for a generator: it receives the base's answer from ``yield`` and
returns an amended one. An implementation may leave out arguments that it does not need; what it
takes must have the hook's names, and no defaults.
"""


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
