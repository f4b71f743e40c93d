"""A family: one architecture's mapping as a chain of steps, and how variants derive from it."""

from __future__ import annotations

import difflib
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pluggy

from phireg.config.fields import FieldTable
from phireg.config.hf import HFConfig
from phireg.errors import PhiregError, PluginError
from phireg.hookspecs import API, PROJECT, Steps
from phireg.layout.quant_rules import QuantRules
from phireg.layout.rules import Rules
from phireg.layout.spans import LayoutError

_Answer = TypeVar("_Answer", FieldTable, Rules, QuantRules)


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model on the Hugging Face hub that a family converts.

    Attributes:
        repo_id: its name there.
        config: the keys of its config.json that decide tensor names and shapes. Values that only
            the user's own copy can tell (rope factors) are not repeated here.
    """

    repo_id: str
    config: Mapping[str, Any]


class Family:
    """A named chain of hook implementations for one or more source architectures.

    Args:
        name: what users type; the entry point must have the same name.
        architectures: values of config.json's ``architectures`` it converts.
        model_types: values of ``model_type`` it converts.
        steps: namespaces (modules, objects) with ``@hookimpl`` functions, base first.
        api: the hook API number the plugin was written against, as a literal.
        tell_apart: for ``--family auto``, why another family of the same architecture should be
            chosen for this config, or None if this one should.
        auto: whether ``--family auto`` considers it; a derived family does so only if it says so.
        published: hub models it converts.
        reference: ``module:class`` of a transformers-compatible model that runs the source
            checkpoint, where transformers itself has none.
        tokenizer: ``module:function`` that loads a tokenizer from a directory, where transformers
            needs remote code for it.
        demo: ``package:directory`` of a small trained model that ``phireg demo`` shows: the files
            of a published one, and ``heldback.jsonl`` with an ``article`` and its ``highlights``
            per line.
        base: the family it is derived from (:meth:`derive` says so), which steps back for it where
            ``--family auto`` has both to choose from.

    Raises:
        PluginError: another API number, an unknown hook (with the nearest known one), an argument
            the hook does not have or that has a default, a step that implements nothing, a hook
            nobody implements.
    """

    def __init__(
        self,
        *,
        name: str,
        architectures: tuple[str, ...],
        model_types: tuple[str, ...],
        steps: tuple[object, ...],
        api: int,
        tell_apart: Callable[[HFConfig], str | None] | None = None,
        auto: bool = True,
        published: tuple[PublishedModel, ...] = (),
        reference: str | None = None,
        tokenizer: str | None = None,
        demo: str | None = None,
        base: Family | None = None,
    ) -> None:
        if api != API:
            raise PluginError(
                f"family '{name}' was written for plugin API {api}; this phireg speaks API {API}",
                hint=f"upgrade {'phireg' if api > API else 'the plugin'}, "
                "or install versions made for each other.",
            )
        self.name = name
        self.architectures = architectures
        self.model_types = model_types
        self.steps = steps
        self.api = api
        self.tell_apart = tell_apart
        self.auto = auto
        self.published = published
        self.reference = reference
        self.tokenizer = tokenizer
        self.demo = demo
        self.base = base
        self._hooks = _register(name, steps)

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
        """A variant: this family's steps, with ``steps`` on top.

        An ``@hookimpl`` function replaces the base's answer; ``@hookimpl(wrapper=True)`` receives
        it (``rules = yield``) and returns an amended one. ``api`` is the hook API number these
        steps were written against, as a literal; a variant in the package of its base may leave it
        out. The variant takes part in ``--family auto`` only when ``tell_apart`` says how to know
        its models; where both claim a model, the variant is taken. The base's published models and
        demo are not the variant's.
        """
        return Family(
            name=name,
            architectures=self.architectures,
            model_types=self.model_types,
            steps=(*self.steps, *steps),
            api=self.api if api is None else api,
            tell_apart=tell_apart,
            auto=tell_apart is not None,
            published=published,
            reference=self.reference,
            tokenizer=self.tokenizer,
            demo=demo,
            base=self,
        )

    def derived_from(self, other: Family) -> bool:
        """Whether ``other`` is its base, or the base of its base, and so on."""
        base = self.base
        while base is not None and base is not other:
            base = base.base
        return base is not None

    def refusal(self, hf: HFConfig) -> str | None:
        """Why this family cannot convert a model with this config, or None if it can."""
        found = [name for name in hf.architectures if name in self.architectures]
        if hf.architectures and not found:
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
        """The family's field table."""
        return self._ask(FieldTable, "phireg_config_fields")

    def weight_rules(self, config: Mapping[str, Any], hf: HFConfig) -> Rules:
        """The family's rules for a translated config.

        Raises:
            LayoutError: the config's sizes do not fit each other.
        """
        return self._ask(Rules, "phireg_weight_rules", config=config, hf=hf)

    def quant_rules(self, config: Mapping[str, Any], scheme: str) -> QuantRules:
        """What a quantization scheme covers."""
        return self._ask(QuantRules, "phireg_quant_rules", config=config, scheme=scheme)

    def _ask(self, kind: type[_Answer], hook: str, **arguments: Any) -> _Answer:
        try:
            answer = getattr(self._hooks.hook, hook)(**arguments)
        except (LayoutError, PhiregError):
            raise
        except Exception as error:
            raise PluginError(
                f"family '{self.name}': {hook} failed with {type(error).__name__}: {error} "
                f"({_culprit(error)})",
                hint="this is a defect of the plugin; report it to its authors.",
            ) from error
        if not isinstance(answer, kind):
            raise PluginError(
                f"family '{self.name}': {hook} returned {type(answer).__name__}, "
                f"not {kind.__name__}"
            )
        return answer


class _Answers:
    """The hooks of one step that have a say: what a later step replaces is not even registered.

    To pluggy an answer of None is no answer, so the base would speak for a variant that forgot to
    return its rules; and a wrapper of the base would amend what the variant put in its place.
    """


def _register(name: str, steps: tuple[object, ...]) -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Steps)
    known = [hook for hook in vars(Steps) if hook.startswith(f"{PROJECT}_")]
    answers: list[_Answers] = []
    implemented: set[str] = set()
    for step in steps:
        own = _Answers()
        for attribute in dir(step):
            options = manager.parse_hookimpl_opts(step, attribute)
            function = getattr(step, attribute, None)
            named = attribute.startswith(f"{PROJECT}_") and callable(function)
            if options is None and not named:
                continue
            _check_hook(name, attribute, function, known, marked=options is not None)
            if options and not options.get("wrapper") and not options.get("hookwrapper"):
                implemented.add(attribute)
                for below in answers:
                    vars(below).pop(attribute, None)
            setattr(own, attribute, function)
        if not vars(own):
            raise PluginError(
                f"family '{name}': the step {_step_name(step)} implements no hook",
                hint=f"mark its functions with @hookimpl; the hooks are {', '.join(known)}.",
            )
        answers.append(own)
    try:
        for own in answers:
            manager.register(own)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"family '{name}': {error}") from error
    if missing := [hook for hook in known if hook not in implemented]:
        raise PluginError(
            f"family '{name}': nobody implements {', '.join(missing)}",
            hint="a family implements every hook; a variant inherits them: BASE.derive(...).",
        )
    return manager


def _check_hook(name: str, hook: str, function: Any, known: list[str], *, marked: bool) -> None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = _place(code.co_filename, code.co_firstlineno) if code else "place unknown"
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


def _culprit(error: Exception) -> str:
    """The line of the plugin that an exception came through last: not one of phireg or a library.

    The frame after pluggy's last one is the hook; the plugin is what lies in the same folder.
    """
    library = Path(pluggy.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    inside = [i for i, frame in enumerate(frames) if Path(frame.filename).parent == library]
    plugin = frames[inside[-1] + 1 :] or frames[-1:]
    folder = Path(plugin[0].filename).parent
    own = [frame for frame in plugin if Path(frame.filename).parent == folder]
    return _place(own[-1].filename, own[-1].lineno or 0)


def _step_name(step: object) -> str:
    return getattr(step, "__name__", type(step).__name__)


def _place(filename: str, line: int) -> str:
    path = Path(filename)
    return f"{path.parent.name}/{path.name}:{line}"
