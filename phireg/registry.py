"""Installed families and targets: an index of entry points, from package metadata alone.

Only the requested one is imported, so a broken plugin affects no other. pluggy's own loader is
not used for discovery: it silently skips the second of two equal names and stops at the first
failing import.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import TypeVar

from phireg.children import ChildError, call
from phireg.config.hf import HFConfig
from phireg.errors import PhiregError, PluginError, SourceError, described
from phireg.family import Family
from phireg.layout.ranks import tp_sizes
from phireg.layout.spans import LayoutError
from phireg.reader.schemes import SCHEMES
from phireg.targets.target import Target, ask, check_fields

GROUP, TARGETS = "phireg.families", "phireg.targets"
"""The entry-point groups in which any distribution offers families and targets."""

OWN = "phireg"
"""The distribution whose plugins are not probed."""

_Offered = TypeVar("_Offered", Family, Target)

_IMPORT_S = 60.0

AUTO = "auto"
"""The ``--family`` that asks every family whether a model is its own."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A family or target that a distribution offers, at ``value`` (``module:attribute``)."""

    name: str
    distribution: str
    version: str
    value: str
    _entry: metadata.EntryPoint = field(repr=False, compare=False)

    @property
    def qualified(self) -> str:
        """The unambiguous name, ``distribution:name``."""
        return f"{self.distribution}:{self.name}"

    def load(self) -> Family:
        """Import the plugin, which must be a Family of the entry point's name."""
        return self._load(Family, "family", "families")

    def load_target(self) -> Target:
        """Import the plugin, which must be a Target of the entry point's name."""
        return self._load(Target, "target", "targets")

    def _load(self, kind: type[_Offered], noun: str, nouns: str) -> _Offered:
        offer = f"{self.distribution} {self.version}"
        try:
            self._probe()
            plugin = self._entry.load()
            if isinstance(plugin, Target):
                check_fields(plugin)
        except PluginError as error:
            raise PluginError(f"{offer}: {error.message}", hint=error.hint) from error
        except KeyboardInterrupt:  # the user's: the probe has met the plugin's own
            raise
        except BaseException as error:
            problem = str(error) if isinstance(error, ChildError) else described(error)
            raise PluginError(
                f"{noun} '{self.name}' is offered by {offer} ({self.value}) but cannot be "
                f"loaded:\n    {problem}",
                hint=f"the other {nouns} are not affected. All plugins: phireg families --check",
            ) from None
        if not isinstance(plugin, kind):
            raise PluginError(
                f"{offer}: {self.value} is a {type(plugin).__name__}, not a "
                f"phireg.api.{kind.__name__}"
            )
        if plugin.name != self.name:
            raise PluginError(
                f"{offer}: the entry point is called '{self.name}', "
                f"but the {noun} is called '{plugin.name}'",
                hint="the two names must be equal.",
            )
        return plugin

    def _probe(self) -> None:
        """Import the plugin in a process of its own: it may end that, or be interrupted there."""

        def load() -> str:
            with suppress(Exception):  # it is met again here, and reported
                self._entry.load()
            return ""

        if self.distribution != OWN and self._entry.module not in sys.modules:
            call(load, seconds=_IMPORT_S)


@dataclass(frozen=True, slots=True)
class FamilyChoice:
    """A loaded family, the candidate it was loaded from, and warnings about other plugins."""

    family: Family
    candidate: Candidate
    warnings: tuple[str, ...] = ()


Index = Mapping[str, tuple[Candidate, ...]]
"""Candidates by name."""


def installed_entry_points(group: str = GROUP) -> tuple[list[metadata.EntryPoint], list[str]]:
    """Return the group's entry points, and a message for each unreadable distribution."""
    with suppress(Exception):
        return list(metadata.entry_points(group=group)), []
    # One damaged entry_points.txt, of any group, makes it fail for all distributions: ask each one.
    entries: list[metadata.EntryPoint] = []
    problems: list[str] = []
    names: set[str] = set()
    for dist in metadata.distributions():
        try:
            name = re.sub(r"[-_.]+", "-", dist.name or "").lower()
            if not name or name not in names:  # as for imports, the first one on the path counts
                entries += [entry for entry in dist.entry_points if entry.group == group]
            names.add(name)
        except Exception as error:
            path = getattr(dist, "_path", "a distribution")
            problems.append(f"{path} cannot be read ({described(error)})")
    return entries, problems


def index(entry_points: Iterable[metadata.EntryPoint] | None = None, group: str = GROUP) -> Index:
    """Return all candidates by name; by default those of all installed entry points of a group."""
    if entry_points is None:
        entry_points, _ = installed_entry_points(group)
    by_name: dict[str, list[Candidate]] = {}
    for entry in entry_points:
        dist = entry.dist
        # The metadata of a damaged installation may lack a name.
        name, version = (dist.name or "unknown", dist.version or "?") if dist else ("unknown", "?")
        candidate = Candidate(entry.name, name, version, entry.value, entry)
        by_name.setdefault(entry.name, []).append(candidate)
    return {
        name: tuple(sorted(by_name[name], key=lambda c: (c.distribution, c.value)))
        for name in sorted(by_name)
    }


def load(name: str, candidates: Index | None = None) -> FamilyChoice:
    """Load the family called ``name`` (or ``distribution:name``), importing nothing else."""
    candidate = _pick(name, index() if candidates is None else candidates, "family")
    return FamilyChoice(candidate.load(), candidate)


def load_target(name: str, form: str | None = None) -> Target:
    """Load the target ``name`` (or ``distribution:name``), for a ``form`` of ``--as``."""
    target = _pick(name, index(group=TARGETS), "target").load_target()
    return ask(target, Target.written_as, form)


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """A candidate with its loaded target, or with the problem why that is broken."""

    candidate: Candidate
    target: Target | None = None
    problem: str | None = None


def targets() -> Iterator[TargetInfo]:
    """Load every target."""
    for candidate in _flat(index(group=TARGETS)):
        try:
            yield TargetInfo(candidate, candidate.load_target())
        except PluginError as error:
            yield TargetInfo(candidate, problem=str(error))


def _pick(name: str, installed: Index, noun: str) -> Candidate:
    distribution, _, plain = name.rpartition(":")
    offers = [
        candidate
        for candidate in installed.get(plain, ())
        if not distribution or candidate.distribution == distribution
    ]
    if not offers:
        near = difflib.get_close_matches(name, installed, 1)
        raise PluginError(
            f"no installed plugin offers a {noun} '{name}'"
            + (f"; did you mean '{near[0]}'?" if near else ""),
            hint=f"installed: {_by_distribution(installed)}",
        )
    if len(offers) > 1:
        raise PluginError(
            f"{noun} '{name}' is offered {len(offers)} times:\n" + _table(offers),
            hint=_qualified(offers, noun),
        )
    return offers[0]


def choose(hf: HFConfig, candidates: Index | None = None) -> FamilyChoice:
    """Choose the family for ``--family auto``.

    Every plugin is imported and consulted; one that fails becomes a warning. If a family and one
    derived from it both claim the model, the derived one is chosen.
    """
    if not hf.architectures and not hf.model_type:
        raise SourceError(
            "config.json names neither architectures nor a model_type, so the family cannot be "
            "chosen automatically",
            hint="name it: --family NAME",
        )
    claims: list[FamilyChoice] = []
    warnings: list[str] = []
    refusals: list[str] = []
    for candidate in _flat(index() if candidates is None else candidates):
        try:
            family = candidate.load()
        except PluginError as error:
            warnings.append(str(error))
            continue
        if not family.auto:
            continue
        try:
            refusal = family.refusal(hf) or (family.tell_apart(hf) if family.tell_apart else None)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            warnings.append(
                f"{candidate.distribution} {candidate.version}: tell_apart of family "
                f"'{family.name}' failed with {described(error)}"
            )
            continue
        if refusal is None:
            claims.append(FamilyChoice(family, candidate))
        else:
            refusals.append(f"    {family.name}: {refusal}")
    claiming = [claim.family for claim in claims]
    claims = [c for c in claims if not any(other.derived_from(c.family) for other in claiming)]
    if len(claims) > 1:
        offers = [claim.candidate for claim in claims]
        raise PluginError(
            f"{len(claims)} families claim this model:\n" + _table(offers),
            hint=_qualified(offers, "family"),
        )
    if not claims:
        raise SourceError(
            "no installed family converts this model:\n" + "\n".join([*refusals, *warnings]),
            hint="list the installed families: phireg families",
        )
    return FamilyChoice(claims[0].family, claims[0].candidate, tuple(warnings))


@dataclass(frozen=True, slots=True)
class FamilyInfo:
    """A candidate with its loaded family, or with the problem why that is broken."""

    candidate: Candidate
    family: Family | None = None
    tp_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by published model
    qformats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by published model
    problem: str | None = None


def families(candidates: Index | None = None) -> tuple[FamilyInfo, ...]:
    """Load every candidate, and call its hooks for the models that it publishes."""
    return tuple(map(_info, _flat(index() if candidates is None else candidates)))


def _info(candidate: Candidate) -> FamilyInfo:
    sizes: dict[str, tuple[int, ...]] = {}
    qformats: dict[str, tuple[str, ...]] = {}
    try:
        family = candidate.load()
        table = family.config_fields()
        for model in family.published:
            hf = HFConfig(model.config)
            translation = table.translate(hf)
            if not translation.ok:
                details = "; ".join(f"{f.subject}: {f.detail}" for f in translation.findings)
                problem = f"its own model {model.repo_id} is refused: {details}"
                return FamilyInfo(candidate, problem=problem)
            sizes[model.repo_id] = tuple(tp_sizes(family.weight_rules(translation.fields, hf)))
            qformats[model.repo_id] = tuple(
                name
                for name, scheme in SCHEMES.items()
                if family.quant_rules(translation.fields, scheme.quant_algo).linears
            )
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        known = isinstance(error, PhiregError | LayoutError)
        return FamilyInfo(candidate, problem=str(error) if known else described(error))
    return FamilyInfo(candidate, family, sizes, qformats)


def _flat(candidates: Index) -> Iterator[Candidate]:
    return (candidate for offers in candidates.values() for candidate in offers)


def _by_distribution(candidates: Index) -> str:
    names: dict[str, list[str]] = {}
    for candidate in _flat(candidates):
        offer = f"{candidate.distribution} {candidate.version}"
        names.setdefault(offer, []).append(candidate.name)
    return "; ".join(f"{', '.join(names[offer])} ({offer})" for offer in names) or "none"


def _table(offers: list[Candidate]) -> str:
    return "\n".join(f"    {c.distribution} {c.version}  {c.name} = {c.value}" for c in offers)


def _qualified(offers: list[Candidate], noun: str) -> str:
    return "choose one: " + "  or  ".join(f"--{noun} {c.qualified}" for c in offers)
