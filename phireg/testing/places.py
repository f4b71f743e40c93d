"""Where in a plugin something is said: file and line of its rules and hooks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from phireg.config.hf import HFConfig
from phireg.family import Family
from phireg.hookspecs import PROJECT
from phireg.layout.rules import Rule, Rules
from phireg.layout.spans import LayoutError
from phireg.verification.recognise import place_of

_WORD = re.compile(r"[\w.]*[\w]\.[\w.]*\w")
_MOST = 8


class Places:
    """Finds the places of a family that concern a module, a part of the model or a message.

    Args:
        family: the family.
        config: a source config.json.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.family = family
        self._hf = HFConfig(config)

    @cached_property
    def rules(self) -> Rules:
        """The rules for this config; none where the config's sizes do not fit."""
        translation = self.family.config_fields().translate(self._hf)
        if not translation.ok:
            return Rules()
        try:
            return self.family.weight_rules(translation.fields, self._hf)
        except LayoutError:
            return Rules()

    def rule(self, tensor: str) -> Rule | None:
        """The rule that makes a checkpoint tensor or module."""
        return self.rules.get(tensor) or self.rules.get(tensor.rpartition(".")[0])

    def where(self, tensor: str) -> str:
        """File and line of the rule that makes a tensor, else of the weight-rules hook."""
        rule = self.rule(tensor)
        return rule.where if rule else self.hook("phireg_weight_rules")

    def hook(self, name: str) -> str:
        """File and line of a hook: of the implementation that answers, and of those amending it."""
        found = []
        for step in reversed(self.family.steps):
            function = getattr(step, name, None)
            if not callable(function):
                continue
            code = inspect.unwrap(function).__code__
            path = Path(code.co_filename)
            found.append(f"{path.parent.name}/{path.name}:{code.co_firstlineno}")
            if not (getattr(function, f"{PROJECT}_impl", None) or {}).get("wrapper"):
                break
        return ", ".join(found)

    def field(self, key: str) -> str:
        """The entries of the field table that may make a checkpoint key; without one, the hook."""
        entries = self.family.config_fields().producing(key)
        shown = " or ".join(f"'{entry.doc}' ({entry.where})" for entry in entries)
        return shown or f"no entry for {key} ({self.hook('phireg_config_fields')})"

    def part(self, layer: int | None, part: str) -> list[Rule]:
        """The rules of one part of the model; parallel blocks share their one norm."""
        found = [r for r in self.rules.values() if place_of(f"{r.target}.weight") == (layer, part)]
        if part == "mlp" and not any("norm" in rule.target for rule in found):
            norm = self.rules.get(f"transformer.layers.{layer}.input_layernorm")
            found = [*([norm] if norm else []), *found]
        return found

    def concerned(self, text: str) -> str:
        """Lines with the rules whose targets or sources a message mentions, else with the hooks.

        Of rules that stand in one line of the plugin only the first is shown.
        """
        text = re.sub(r"\{(\d+)[^}]*\}", r"\1", text)
        words = set(_WORD.findall(text)) | set(re.findall(r"\blm_head\b", text))
        stems = words | {word.rpartition(".")[0] for word in words}
        return self.lines(
            rule
            for rule in self.rules.values()
            if rule.target in stems
            or any(name in stems for axis in (*rule.weight, *rule.bias) for name, _ in axis.sources)
        )

    def lines(self, rules: Iterable[Rule]) -> str:
        """Rules as indented lines, one for each place in the plugin."""
        by_place: dict[str, Rule] = {}
        for rule in rules:
            by_place.setdefault(rule.where, rule)
        shown = [
            f"    {rule.where}  {rule.target} <- {', '.join(n for n, _ in rule.weight[0].sources)}"
            for rule in by_place.values()
        ]
        if len(shown) > _MOST:
            shown = [*shown[:_MOST], f"    ... and {len(shown) - _MOST} more"]
        return "\n".join(shown) or f"    {self.hook('phireg_weight_rules')}  the weight rules"
