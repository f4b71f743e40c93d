"""Families: the mapping of an architecture as a chain of hook implementations, and variants."""

from __future__ import annotations

import difflib
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pluggy

from phireg.config.fields import FieldTable
from phireg.config.hf import HFConfig
from phireg.errors import PhiregError, PluginError, described
from phireg.findings import source_line
from phireg.hookspecs import API, PROJECT, Steps
from phireg.layout.rules import QuantRules, Rules
from phireg.layout.spans import LayoutError

_Result = TypeVar("_Result", FieldTable, Rules, QuantRules)


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model on the Hugging Face hub that a family converts.

    Attributes:
        repo_id: its name there.
        config: the keys of its config.json that decide tensor names and shapes; long values that
            decide neither (rope factors) are left out.
    """

    repo_id: str
    config: Mapping[str, Any]


@dataclass(kw_only=True, eq=False, repr=False)
class Family:
    """A named chain of hook implementations for one or more source architectures.

    Args:
        name: the value of ``--family``; the entry point must have the same name.
        architectures: values of config.json's ``architectures`` that it converts.
        model_types: values of ``model_type`` that it converts.
        steps: namespaces (modules, objects) with ``@hookimpl`` functions, base first.
        api: the hook API number that the plugin was written against, as a literal.
        tell_apart: for ``--family auto``, returns why a config belongs to another family of the
            same architecture, or None if it belongs to this one.
        auto: whether ``--family auto`` considers it.
        published: hub models that it converts.
        reference: ``module:class`` of a transformers-compatible model that runs the source
            checkpoint, if transformers itself has none.
        tokenizer: ``module:function`` that loads a tokenizer from a directory, if transformers
            needs remote code for it.
        demo: ``package:directory`` of a small trained model for ``phireg demo``: the files of a
            published one, and ``heldback.jsonl`` with an ``article`` and its ``highlights`` per
            line.
        base: the family that it is derived from, set by :meth:`derive`. ``--family auto`` prefers
            the derived one where both claim a model.

    Raises:
        PluginError: another API number, an unknown hook (with the nearest known one), an argument
            that the hook does not have or that has a default, a step without hooks, or a hook
            without implementation.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    steps: tuple[object, ...]
    api: int
    tell_apart: Callable[[HFConfig], str | None] | None = None
    auto: bool = True
    published: tuple[PublishedModel, ...] = ()
    reference: str | None = None
    tokenizer: str | None = None
    demo: str | None = None
    base: Family | None = None
    _hooks: pluggy.PluginManager = field(init=False)

    def __post_init__(self) -> None:
        if self.api != API:
            raise PluginError(
                f"family '{self.name}' was written for plugin API {self.api}; this phireg has API "
                f"{API}",
                hint=f"upgrade {'phireg' if self.api > API else 'the plugin'}, "
                "or install versions that fit together.",
            )
        self._hooks = _register(self.name, self.steps)

    def __repr__(self) -> str:
        return f"<Family {self.name}>"

    def derive(
        self,
        name: str,
        *steps: object,
        api: int | None = None,
        tell_apart: Callable[[HFConfig], str | None] | None = None,
        published: tuple[PublishedModel, ...] = (),
        demo: str | None = None,
    ) -> Family:
        """Create a variant: this family's steps, with ``steps`` on top.

        An ``@hookimpl`` function replaces the base's; ``@hookimpl(wrapper=True)`` receives the
        base's result (``rules = yield``) and returns an amended one. ``api`` is the hook API number
        that these steps were written against, as a literal; a variant in the package of its base
        may leave it out. ``--family auto`` considers the variant only if it has ``tell_apart``, and
        prefers it where both claim a model. It does not inherit the published models and the demo.
        """
        return replace(
            self,
            name=name,
            steps=(*self.steps, *steps),
            api=self.api if api is None else api,
            tell_apart=tell_apart,
            auto=tell_apart is not None,
            published=published,
            demo=demo,
            base=self,
        )

    def derived_from(self, other: Family) -> bool:
        """Return whether ``other`` is among its bases, direct or not."""
        base = self.base
        while base is not None and base is not other:
            base = base.base
        return base is not None

    def refusal(self, hf: HFConfig) -> str | None:
        """Return why this family cannot convert a model with this config, or None if it can."""
        if hf.architectures and not set(hf.architectures) & set(self.architectures):
            return (
                f"its architecture is {' / '.join(hf.architectures)}, "
                f"and {self.name} converts {' / '.join(self.architectures)}"
            )
        if hf.model_type and hf.model_type not in self.model_types:
            return (
                f"its model_type is '{hf.model_type}', "
                f"and {self.name} converts {' / '.join(self.model_types)}"
            )
        return None

    def config_fields(self) -> FieldTable:
        """Return the family's field table."""
        return self._call(FieldTable, "phireg_config_fields")

    def weight_rules(self, config: Mapping[str, Any], hf: HFConfig) -> Rules:
        """Return the family's rules for a translated config.

        Raises:
            LayoutError: the config's sizes do not fit each other.
        """
        return self._call(Rules, "phireg_weight_rules", config=config, hf=hf)

    def quant_rules(self, config: Mapping[str, Any], scheme: str) -> QuantRules:
        """Return the modules that a quantization scheme covers."""
        return self._call(QuantRules, "phireg_quant_rules", config=config, scheme=scheme)

    def _call(self, kind: type[_Result], hook: str, **arguments: Any) -> _Result:
        try:
            result = getattr(self._hooks.hook, hook)(**arguments)
        except (LayoutError, PhiregError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise PluginError(
                f"family '{self.name}': {hook} failed with {described(error)} "
                f"({_plugin_line(error)})",
                hint="this is a defect of the plugin; report it to its authors.",
            ) from error
        if not isinstance(result, kind):
            raise PluginError(
                f"family '{self.name}': {hook} returned {type(result).__name__}, "
                f"not {kind.__name__}"
            )
        return result


class _EffectiveHooks:
    """The hooks of one step that no later step replaces; only these are registered.

    pluggy skips a result of None, so with the base's hook registered too it would be called for a
    variant that forgot to return its rules; and a wrapper of the base would amend the variant's.
    """


def _register(name: str, steps: tuple[object, ...]) -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Steps)
    known = [hook for hook in vars(Steps) if hook.startswith(f"{PROJECT}_")]
    effective: list[_EffectiveHooks] = []
    implemented: set[str] = set()
    for step in steps:
        hooks = _EffectiveHooks()
        for attribute in dir(step):
            options = manager.parse_hookimpl_opts(step, attribute)
            function = getattr(step, attribute, None)
            named_like_hook = attribute.startswith(f"{PROJECT}_") and callable(function)
            if options is None and not named_like_hook:
                continue
            _check_hook(name, attribute, function, known, marked=options is not None)
            if options and not options.get("wrapper") and not options.get("hookwrapper"):
                implemented.add(attribute)
                for below in effective:
                    vars(below).pop(attribute, None)
            setattr(hooks, attribute, function)
        if not vars(hooks):
            raise PluginError(
                f"family '{name}': the step {getattr(step, '__name__', type(step).__name__)} "
                "implements no hook",
                hint=f"mark its functions with @hookimpl; the hooks are {', '.join(known)}.",
            )
        effective.append(hooks)
    try:
        for hooks in effective:
            manager.register(hooks)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"family '{name}': {error}") from error
    if missing := [hook for hook in known if hook not in implemented]:
        raise PluginError(
            f"family '{name}': no step implements {', '.join(missing)}",
            hint="a family implements every hook; a variant inherits them: BASE.derive(...).",
        )
    return manager


def _check_hook(name: str, hook: str, function: Any, known: list[str], *, marked: bool) -> None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = source_line(code.co_filename, code.co_firstlineno) if code else "place unknown"
    if hook not in known:
        near = difflib.get_close_matches(hook, known, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"the hooks are {', '.join(known)}."
        raise PluginError(f"family '{name}': there is no hook '{hook}' ({place})", hint=hint)
    if not marked:
        raise PluginError(
            f"family '{name}': '{hook}' is not marked as a hook ({place})",
            hint="decorate it with @hookimpl.",
        )
    accepted = [arg for arg in inspect.signature(getattr(Steps, hook)).parameters if arg != "self"]
    for argument in inspect.signature(function).parameters.values():
        if argument.name not in accepted or argument.kind is argument.VAR_KEYWORD:
            raise PluginError(
                f"family '{name}': '{hook}' has no argument '{argument.name}' ({place})",
                hint=f"its arguments are: {', '.join(accepted) or 'none'}.",
            )
        if argument.default is not argument.empty:
            raise PluginError(
                f"family '{name}': argument '{argument.name}' of '{hook}' has a default ({place})",
                hint="pluggy versions differ in whether such an argument is filled in; remove the "
                "default.",
            )


def _plugin_line(error: BaseException) -> str:
    """Return the innermost line of the plugin in a traceback, skipping phireg and libraries."""
    library = Path(pluggy.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    inside = [i for i, frame in enumerate(frames) if Path(frame.filename).parent == library]
    called = frames[inside[-1] + 1 :] or frames[-1:]
    folder = Path(called[0].filename).parent
    line = [frame for frame in called if Path(frame.filename).parent == folder][-1]
    return source_line(line.filename, line.lineno or 0)
