"""The hooks a family implements, and the API number plugins are written against.

Each hook returns immutable data. Hooks see neither tensors nor ranks, so a mapping cannot depend on
them. A plugin states the API number it was written against, and phireg refuses any other.

Compatible changes keep the number: a new argument of a hook (implementations may take fewer
arguments than the specification), a new optional hook, a new name in ``phireg.api``, a new optional
argument of one of its functions.

Any other change raises ``API`` by one: a hook, an argument or a name is removed or changes its
meaning. It is deprecated first: for at least one minor release of phireg it works as before and
raises a ``DeprecationWarning`` (which pytest shows) that names the replacement, and the changelog
and the history below list it.

History: API 1 (phireg 0.1) has three hooks, ``phireg_config_fields``, ``phireg_weight_rules`` and
``phireg_quant_rules``. Nothing is deprecated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

from phireg.config.fields import FieldTable
from phireg.config.hf import HFConfig
from phireg.layout.rules import QuantRules, Rules

API = 1
"""The hook API number of this phireg."""

PROJECT = "phireg"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Mark a function as the implementation of the hook it is named after.

``@hookimpl`` implements the hook; in a derived family it replaces the base's implementation.
``@hookimpl(wrapper=True)`` is for a generator: it receives the base's result from ``yield`` and
returns an amended one. An implementation may leave out arguments that it does not need; those it
takes must have the hook's names, and no defaults.
"""


class Steps:
    """The specification of the hooks; a family implements all of them."""

    @hookspec(firstresult=True)
    def phireg_config_fields(self) -> FieldTable:
        """Return the table that translates the source's config.json to the checkpoint's."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def phireg_weight_rules(self, config: Mapping[str, Any], hf: HFConfig) -> Rules:
        """Return the rules that map source rows to target modules.

        Args:
            config: the translated fields, by TensorRT-LLM's names (``hidden_size``,
                ``num_key_value_heads``, ``head_size``, ``intermediate_size``, ...).
            hf: the source config, for keys without a counterpart there.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def phireg_quant_rules(self, config: Mapping[str, Any], scheme: str) -> QuantRules:
        """Return the linears that a scheme quantizes, and the row order of foreign exports.

        Args:
            config: the translated fields.
            scheme: TensorRT-LLM's ``quant_algo``, e.g. ``FP8`` or ``W8A16``.
        """
        raise NotImplementedError
