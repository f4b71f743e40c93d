"""The families that are installed: an index of package metadata that imports nothing.

Only the family asked for is imported, so a broken plugin cannot stop a user of another. Discovery
does not use pluggy's own loader, which skips the second of two equal names in silence and stops at
the first failing import.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata

from phireg.config.hf import HFConfig
from phireg.errors import PluginError, SourceError
from phireg.family import Family

GROUP = "phireg.families"
"""The entry-point group in which any distribution offers families."""

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One offer of a family, as metadata tells it.

    Attributes:
        name: family name.
        distribution: name of the distribution that offers it.
        version: its version.
        value: where the object is, ``module:attribute``.
    """

    name: str
    distribution: str
    version: str
    value: str
    _entry: metadata.EntryPoint = field(repr=False, compare=False)

    @property
    def qualified(self) -> str:
        """The name that is never ambiguous: ``distribution:name``."""
        return f"{self.distribution}:{self.name}"

    def load(self) -> Family:
        """Import the plugin.

        Raises:
            PluginError: it cannot be imported, is not a Family, or has another name.
        """
        offer = f"{self.distribution} {self.version}"
        try:
            # What a stranger's module prints must not get into what a command reports.
            with redirect_stdout(sys.stderr):
                loaded = self._entry.load()
        except PluginError as error:
            raise PluginError(f"{offer}: {error.message}", hint=error.hint) from error
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"family '{self.name}' is offered by {offer} ({self.value}) but cannot be "
                f"loaded:\n    {type(error).__name__}: {error}",
                hint="the other families are not affected. All plugins: phireg plugins --check",
            ) from error
        if not isinstance(loaded, Family):
            raise PluginError(
                f"{offer}: {self.value} is a {type(loaded).__name__}, not a phireg.api.Family"
            )
        if loaded.name != self.name:
            raise PluginError(
                f"{offer}: the entry point is called '{self.name}', "
                f"but the family calls itself '{loaded.name}'",
                hint="they must be equal.",
            )
        return loaded


@dataclass(frozen=True, slots=True)
class Chosen:
    """A loaded family, who provides it, and what was noticed on the way."""

    family: Family
    candidate: Candidate
    warnings: tuple[str, ...] = ()


Index = Mapping[str, tuple[Candidate, ...]]


def installed_entry_points() -> tuple[list[metadata.EntryPoint], list[str]]:
    """The group's entry points, and what is wrong with distributions that cannot be read."""
    try:
        return list(metadata.entry_points(group=GROUP)), []
    except Exception:
        # It gives up on all distributions if the entry_points.txt of one, for whatever group, is
        # damaged; so each is asked by itself.
        return _one_by_one(metadata.distributions())


def _one_by_one(
    distributions: Iterable[metadata.Distribution],
) -> tuple[list[metadata.EntryPoint], list[str]]:
    found: list[metadata.EntryPoint] = []
    damaged: list[str] = []
    seen: set[str] = set()
    for dist in distributions:
        try:
            name = re.sub(r"[-_.]+", "-", dist.name or "").lower()
            if not name or name not in seen:  # as for imports, the first one on the path counts
                found += [entry for entry in dist.entry_points if entry.group == GROUP]
            seen.add(name)
        except Exception as error:
            place = getattr(dist, "_path", "a distribution")
            damaged.append(f"{place} cannot be read ({type(error).__name__}: {error})")
    return found, damaged


def index(entry_points: Iterable[metadata.EntryPoint] | None = None) -> Index:
    """All candidates by family name, read from metadata.

    Args:
        entry_points: what to index; by default all installed ones of the group.
    """
    if entry_points is None:
        entry_points, _ = installed_entry_points()
    found: dict[str, list[Candidate]] = {}
    for entry in entry_points:
        dist = entry.dist
        # A damaged installation has metadata without a name; it must not stop the others.
        name, version = (dist.name or "unknown", dist.version or "?") if dist else ("unknown", "?")
        candidate = Candidate(entry.name, name, version, entry.value, entry)
        found.setdefault(entry.name, []).append(candidate)
    return {
        name: tuple(sorted(found[name], key=lambda c: (c.distribution, c.value)))
        for name in sorted(found)
    }


def load(name: str, candidates: Index | None = None) -> Chosen:
    """The family called ``name`` (or ``distribution:name``); nothing else is imported.

    Raises:
        PluginError: nobody offers it, several do, or the one that does is broken.
    """
    known = index() if candidates is None else candidates
    distribution, _, plain = name.rpartition(":")
    offers = [c for c in known.get(plain, ()) if not distribution or c.distribution == distribution]
    if not offers:
        near = difflib.get_close_matches(name, known, 1)
        raise PluginError(
            f"no installed plugin offers a family '{name}'"
            + (f"; did you mean '{near[0]}'?" if near else ""),
            hint=f"installed: {_listed(known)}",
        )
    if len(offers) > 1:
        raise PluginError(
            f"family '{name}' is offered {len(offers)} times:\n" + _table(offers),
            hint=f"say which: {_choices(offers)}",
        )
    return Chosen(offers[0].load(), offers[0])


def choose(hf: HFConfig, candidates: Index | None = None) -> Chosen:
    """The family that ``--family auto`` takes for a config.

    Every plugin must be imported to be asked; one that fails is a warning. A family derived from
    another knows more, so where both claim the model the base steps back.

    Raises:
        PluginError: several families claim the model, none of them derived from the others.
        SourceError: none does (the reasons are listed), or the config does not name its model.
    """
    if not hf.architectures and not hf.model_type:
        raise SourceError(
            "config.json names neither architectures nor a model_type, so nothing says which "
            "family it belongs to",
            hint="say which: --family NAME",
        )
    known = index() if candidates is None else candidates
    claims: list[Chosen] = []
    warnings: list[str] = []
    reasons: list[str] = []
    for candidate in (c for offers in known.values() for c in offers):
        try:
            family = candidate.load()
        except PluginError as error:
            warnings.append(str(error))
            continue
        if not family.auto:
            continue
        try:
            reason = family.refusal(hf) or (family.tell_apart(hf) if family.tell_apart else None)
        except Exception as error:
            warnings.append(
                f"{candidate.distribution} {candidate.version}: tell_apart of family "
                f"'{family.name}' failed with {type(error).__name__}: {error}"
            )
            continue
        if reason is None:
            claims.append(Chosen(family, candidate))
        else:
            reasons.append(f"    {family.name}: {reason}")
    claimed = [claim.family for claim in claims]
    claims = [c for c in claims if not any(f.derived_from(c.family) for f in claimed)]
    if len(claims) > 1:
        offers = [claim.candidate for claim in claims]
        raise PluginError(
            f"{len(claims)} families claim this model:\n" + _table(offers),
            hint=f"say which: {_choices(offers)}",
        )
    if not claims:
        raise SourceError(
            "no installed family converts this model:\n" + "\n".join([*reasons, *warnings]),
            hint="phireg families lists what is installed.",
        )
    return Chosen(claims[0].family, claims[0].candidate, tuple(warnings))


def _listed(known: Index) -> str:
    by_offer: dict[str, list[str]] = {}
    for offers in known.values():
        for c in offers:
            by_offer.setdefault(f"{c.distribution} {c.version}", []).append(c.name)
    return "; ".join(f"{', '.join(names)} ({offer})" for offer, names in by_offer.items()) or "none"


def _table(offers: list[Candidate]) -> str:
    return "\n".join(f"    {c.distribution} {c.version}  {c.name} = {c.value}" for c in offers)


def _choices(offers: list[Candidate]) -> str:
    return "  or  ".join(f"--family {c.qualified}" for c in offers)
