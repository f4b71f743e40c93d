"""Config translation as a table: how a source config.json becomes the checkpoint's.

A table is data. Every source key must be read by an entry or ignored with a reason, every target
key has one producer, and all problems are reported together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from phireg.config.hf import HFConfig
from phireg.findings import Finding, Severity, calling_line

_HERE = Path(__file__).parent

Fields = Mapping[str, Any]
"""Target fields produced so far, by TensorRT-LLM's names."""

Kind = Callable[[Any], Any]
"""Checks and normalizes one value; raises ValueError with what was expected."""


class ConfigError(ValueError):
    """A derived field cannot be computed; the text says why and what would work."""


def integer(minimum: int = 1, maximum: int = 2**24) -> Kind:
    """Accept a whole number within bounds, which keep a damaged config from exhausting memory."""

    def kind(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("expected a whole number")
        if not minimum <= value <= maximum:
            raise ValueError(f"expected a whole number from {minimum} to {maximum}")
        return value

    return kind


def number(value: Any) -> float:
    """Accept a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("expected a finite number")
    try:
        result = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        result = math.inf
    if not math.isfinite(result):
        raise ValueError("expected a finite number")
    return result


def positive(value: Any) -> float:
    """Accept a finite number above zero."""
    result = number(value)
    if result <= 0:
        raise ValueError("expected a number above zero")
    return result


def boolean(value: Any) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def text(value: Any) -> str:
    """Accept a string."""
    if not isinstance(value, str):
        raise ValueError("expected a string")
    return value


def factors(value: Any) -> list[float]:
    """Accept a list of positive numbers (rope factors), in float64 as the source has them."""
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of numbers")
    return [positive(item) for item in value]


@dataclass(slots=True)
class _Run:
    hf: HFConfig
    fields: dict[str, Any] = dataclass_field(default_factory=dict)
    findings: list[Finding] = dataclass_field(default_factory=list)
    # Subjects that could not be checked, the field each lacked, and the entry's place.
    skipped: list[tuple[str, str, str]] = dataclass_field(default_factory=list)
    where: str = ""  # the place of the entry that is being applied

    def do(self, entry: Entry) -> None:
        """Apply an entry; its findings have its place."""
        outer, self.where = self.where, entry.where
        entry.apply(self)
        self.where = outer

    def compute(self, subject: str, function: Callable[[Fields, HFConfig], Any]) -> Any:
        """Return the result of ``function``; ``_SKIPPED`` after noting or reporting a failure."""
        try:
            return function(self.fields, self.hf)
        except KeyError as lacking:
            self.skipped.append((subject, str(lacking), self.where))
        except ConfigError as problem:
            self.report(Severity.ERROR, subject, str(problem))
        return _SKIPPED

    def set(self, to: str, function: Callable[[Fields, HFConfig], Any]) -> None:
        value = self.compute(to, function)
        if value is not _SKIPPED:
            self.fields[to] = value

    def report(self, severity: Severity, subject: str, detail: str) -> None:
        self.findings.append(Finding(severity, "config", subject, detail, self.where))


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a field table; made by the functions of this module.

    Attributes:
        to: target keys it produces.
        doc: the line as documentation.
        apply: applies it.
        where: file and line that made it, for error messages.
        inner: the entries of both branches of :func:`when`.
    """

    to: tuple[str, ...]
    doc: str
    apply: Callable[[_Run], None]
    where: str
    inner: tuple[Entry, ...] = ()


_UNSET: Any = object()  # no default, None being a possible value
_SKIPPED: Any = object()  # a value that could not be computed


def _entry(
    to: tuple[str, ...], doc: str, apply: Callable[[_Run], None], inner: tuple[Entry, ...] = ()
) -> Entry:
    return Entry(to, doc, apply, calling_line(_HERE), inner)


def const(to: str, value: Any) -> Entry:
    """Set ``to`` to ``value``, always."""

    def apply(run: _Run) -> None:
        run.fields[to] = copy.deepcopy(value)

    return _entry((to,), f"{to} = {value!r}", apply)


def field(
    *keys: str,
    kind: Kind,
    to: str | None = None,
    default: Any = _UNSET,
    null: Any = _UNSET,
    via: Mapping[Any, Any] | None = None,
) -> Entry:
    """Set ``to`` to the value of the first of ``keys`` that is present.

    Args:
        keys: source keys, dotted to reach into blocks; those present must agree.
        kind: checks the value.
        to: target key; the first source key by default.
        default: value when no key is present, or a function of the fields so far (as in
            :func:`derive`); without one the field is required.
        null: value when the first key is there and null, if that differs from its absence.
        via: translation of values; a value it does not know is an error naming those it knows.
    """
    target = to or keys[0]

    def apply(run: _Run) -> None:
        present = {key: run.hf.get(key) for key in keys if run.hf.has(key)}
        if not present:
            if null is not _UNSET and run.hf.is_null(keys[0]):
                run.fields[target] = null
            elif default is _UNSET:
                others = f" (or spelled {', '.join(keys[1:])})" if len(keys) > 1 else ""
                run.report(Severity.ERROR, keys[0], f"missing{others}")
            else:
                computed = callable(default)
                run.set(target, lambda x, _: default(x) if computed else copy.deepcopy(default))
            return
        key, value = next(iter(present.items()))
        for other, second in list(present.items())[1:]:
            if second != value:
                run.report(
                    Severity.ERROR, key, f"is {_show(value)}, but {other} is {_show(second)}"
                )
                return
        try:
            value = kind(value)
        except ValueError as problem:
            run.report(Severity.ERROR, key, f"{problem}, found {_show(value)}")
            return
        if via is not None and value not in via:
            known = ", ".join(map(str, via))
            run.report(Severity.ERROR, key, f"{value!r} is not supported; supported: {known}")
            return
        run.fields[target] = value if via is None else via[value]

    return _entry((target,), f"{target} <- {' | '.join(keys)}", apply)


def derive(to: str, function: Callable[[Fields, HFConfig], Any], doc: str) -> Entry:
    """Compute ``to`` from the fields so far and the source.

    ``function`` may raise :class:`ConfigError`. A field it needs that could not be read is a
    problem already reported, so the entry is skipped; without such a report it is an error.
    """
    return _entry((to,), f"{to} = {doc}", lambda run: run.set(to, function))


def check(
    subject: str,
    function: Callable[[Fields, HFConfig], str | None],
    *,
    severity: Severity = Severity.ERROR,
) -> Entry:
    """Report the text that ``function`` returns, if any; skipped like :func:`derive`."""

    def apply(run: _Run) -> None:
        detail = run.compute(subject, function)
        if detail and detail is not _SKIPPED:
            run.report(severity, subject, detail)

    return _entry((), f"checked: {subject}", apply)


def refuse(key: str, *, unless: Sequence[Any], why: str) -> Entry:
    """Refuse ``key`` unless it is absent or one of ``unless``, which the reader can express."""

    def apply(run: _Run) -> None:
        value = run.hf.get(key)
        if value is not None and value not in unless:
            run.report(Severity.ERROR, key, f"is {_show(value)}: {why}")

    return _entry((), f"{key} must be absent or one of {list(unless)}: {why}", apply)


def ignore(*keys: str, why: str) -> Entry:
    """Declare keys that have no counterpart, with the reason."""

    def apply(run: _Run) -> None:
        for key in keys:
            run.hf.get(key)

    return _entry((), f"ignored, {why}: {', '.join(keys)}", apply)


def when(
    condition: Callable[[HFConfig], bool], *entries: Entry, otherwise: Sequence[Entry] = ()
) -> Entry:
    """Apply ``entries`` if the source satisfies ``condition``, else ``otherwise``.

    Raises:
        ValueError: two entries of one branch produce the same target key.
    """
    for branch in (entries, otherwise):
        _one_producer_each(branch)

    def apply(run: _Run) -> None:
        for entry in entries if condition(run.hf) else otherwise:
            run.do(entry)

    name = condition.__name__
    lines = [f"if {name}: {entry.doc}" for entry in entries]
    lines += [f"unless {name}: {entry.doc}" for entry in otherwise]
    produced = dict.fromkeys(key for entry in (*entries, *otherwise) for key in entry.to)
    return _entry(tuple(produced), "\n".join(lines), apply, (*entries, *otherwise))


@dataclass(frozen=True, slots=True)
class Translation:
    """The result of a table."""

    fields: dict[str, Any]  # by target key; incomplete if there are errors
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Return whether there is no error."""
        return not any(finding.severity is Severity.ERROR for finding in self.findings)


class FieldTable:
    """An immutable table of entries.

    Raises:
        ValueError: two entries produce the same target key.
    """

    def __init__(self, *entries: Entry) -> None:
        _one_producer_each(entries)
        self.entries = entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def replace(self, *entries: Entry) -> FieldTable:
        """Return the table with entries of the same target keys replaced, others appended."""
        _one_producer_each(entries)
        by_target = {entry.to: entry for entry in entries if entry.to}
        kept = [by_target.pop(entry.to, entry) for entry in self.entries]
        return FieldTable(*kept, *by_target.values(), *(e for e in entries if not e.to))

    def translate(self, hf: HFConfig) -> Translation:
        """Apply the table to a source config.

        A source key that no entry read is a warning; inside a block that the table reads from it
        is an error, because an unknown key there (of rope scaling, say) changes the mathematics.
        """
        run = _Run(hf.fresh())
        for entry in self.entries:
            run.do(entry)
        if not any(finding.severity is Severity.ERROR for finding in run.findings):
            for subject, lacking, where in run.skipped:
                run.where = where
                run.report(Severity.ERROR, subject, f"needs {lacking}, which no entry above makes")
        run.where = ""
        for key in run.hf.unread():
            inside = "." in key or run.hf.looked_into(key)
            severity = Severity.ERROR if inside else Severity.WARNING
            run.report(severity, key, "is not known to this family and has no effect here")
        return Translation(run.fields, tuple(run.findings))

    def producing(self, key: str) -> tuple[Entry, ...]:
        """Return the entries that may produce a key: one, or those of branches of :func:`when`."""
        return tuple(entry for entry in _single(self.entries) if key in entry.to)

    def describe(self) -> tuple[str, ...]:
        """Return the table as documentation, a line per field or rule."""
        return tuple(line for entry in self.entries for line in entry.doc.splitlines())


def _single(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield entries, those of :func:`when` in place of itself."""
    for entry in entries:
        if entry.inner:
            yield from _single(entry.inner)
        else:
            yield entry


def _one_producer_each(entries: Sequence[Entry]) -> None:
    produced: dict[str, str] = {}
    for entry in entries:
        for key in entry.to:
            if key in produced:
                raise ValueError(
                    f"field table: {key} has two producers: {produced[key]} and {entry.where}"
                )
            produced[key] = entry.where


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
