"""What would make a wrong part of the model right: tried out against the reference.

A logits check says in which part the executor and the reference come apart; which of its rules is
wrong, and how, it cannot say. So likely mistakes are undone one by one, and the one whose undoing
makes that part agree is the answer. The reference decides, not the family's own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch

from phireg.errors import PhiregError
from phireg.executor import Executor
from phireg.layout.rules import Rule
from phireg.reader.spec import parse_spec
from phireg.reference.load import Reference
from phireg.testing.model import TinyModel
from phireg.testing.probe import Addresses
from phireg.verification.logits import compare_logits
from phireg.verification.measure_types import Place
from phireg.verification.patterns import Heads, fc_candidates, head_name, qkv_candidates
from phireg.verification.prompts import Prompt, Prompts
from phireg.verification.recognise import heads_of

_ACTIVATIONS = ("gelu_new", "swiglu", "gegelu")
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "num_kv_heads", "head_size", "vocab_size", "intermediate_size", "max_position_embeddings",
)  # fmt: skip

Tensors = Mapping[str, Addresses]
"""Tensors of a checkpoint at TP 1 by name, as addresses of source elements."""


@dataclass(frozen=True, slots=True)
class Change:
    """One likely mistake, undone.

    Attributes:
        rule: the rule it would be in.
        text: what the mistake is.
        tensors: the tensors as they would be without it.
    """

    rule: Rule
    text: str
    tensors: Tensors


class Repairs:
    """Tries changes of a model's checkpoint at TP 1.

    Args:
        model: the model under test; it has a plan.
        reference: its source model, as ``phireg verify`` loads it.
        tokens: lengths of the prompts to compare with.
    """

    def __init__(self, model: TinyModel, reference: Reference, tokens: tuple[int, ...]) -> None:
        self.model = model
        self.reference = reference
        self.prompts = Prompts(tuple(Prompt(n, "") for n in tokens), (), ())
        self.config = dict(model.planned(1).config)
        self.made = model.probes(1)[0]
        self.values = _source_values(model)

    def explain(self, place: Place) -> list[str]:
        """The single mistakes that explain a wrong part, each with its place in the plugin.

        Some cannot be told apart: two query heads of one group may be exchanged in qkv or in the
        columns of dense. At most one is given for each rule, and fields only where no rule is.
        """
        if self._agrees(place, self.config, self.made):
            return []  # wrong with other prompts only: nothing tried here would tell
        found: dict[str, str] = {}
        for change in self._changes(self.model.places.part(*place)):
            target = change.rule.target
            if target not in found and self._agrees(
                place, self.config, {**self.made, **change.tensors}
            ):
                moved = (
                    self.model.book.difference(name, self.made[name], wanted)
                    for name, wanted in change.tensors.items()
                )
                rows = "; ".join(text for text in moved if text)
                found[target] = f"{change.rule.where}: {target}: {change.text}: {rows}"
        if found:
            return list(found.values())
        for key, value, origin in self._fields():
            if self._agrees(place, {**self.config, key: value}, self.made):
                return [
                    f"{self.model.places.field(key)}: {key} is {self.config.get(key)!r}; "
                    f"it agrees with the reference if it is {value!r}{origin}"
                ]
        return []

    def _agrees(self, place: Place, config: Mapping[str, Any], tensors: Tensors) -> bool:
        def read(name: str) -> torch.Tensor:
            return torch.from_numpy(self.values[tensors[name]])

        try:
            spec = parse_spec({**config})
            executor = Executor(spec, [read], range(1), dtype="float32")
            result = compare_logits(executor, self.reference, self.prompts)
        except (PhiregError, RuntimeError, IndexError, KeyError):
            return False  # sizes that do not go together
        return dict(result.places)[place] <= result.tolerance

    def _changes(self, rules: list[Rule]) -> Iterator[Change]:
        heads = heads_of(self.config)
        for rule in rules:
            for text, reordered in _orders(rule, self.made, heads):
                yield Change(rule, text, reordered)
        for rule in rules:
            yield from self._replaced(rule)

    def _replaced(self, rule: Rule) -> Iterator[Change]:
        """Other source modules of the same shape in the place of one the rule reads."""
        shapes = self.model.book.shapes
        made = [name for name in (f"{rule.target}.{c}" for c in rule.tensors) if name in self.made]
        for names in [made] if len(made) < 2 else [made, *([name] for name in made)]:
            for part in _sources_of(rule, self.model):
                for other in sorted({name.rpartition(".")[0] for name in shapes}):
                    changed = {}
                    for name in names:
                        kind = name.rpartition(".")[2]
                        old, new = f"{part}.{kind}", f"{other}.{kind}"
                        if old not in shapes or shapes.get(new) != shapes[old] or old == new:
                            break
                        changed[name] = self._substituted(name, old, new)
                    else:
                        yield Change(rule, f"it reads {part}, not {other}", changed)

    def _substituted(self, name: str, old: str, new: str) -> Addresses:
        first, last = (int(self.model.book.tensor(old).reshape(-1)[n]) for n in (0, -1))
        shift = int(self.model.book.tensor(new).reshape(-1)[0]) - first
        made = self.made[name].astype(np.int64)
        return np.where((made >= first) & (made <= last), made + shift, made).astype(np.uint32)

    def _fields(self) -> Iterator[tuple[str, Any, str]]:
        """Other values for the checkpoint's config: those the source's config has somewhere."""
        leaves = dict(_leaves(self.model.config))
        for key, now in self.config.items():
            if key in _SIZES or key in ("architecture", "dtype", "mapping", "quantization"):
                continue
            if key == "hidden_act":
                yield from ((key, name, "") for name in _ACTIVATIONS if name != now)
                continue
            for spelt, value in leaves.items():
                if type(value) in _kinds(now) and value != now:
                    yield key, value, f", which config.json has as {spelt}"


def _kinds(now: Any) -> tuple[type, ...]:
    if isinstance(now, bool) or now is None:
        return (bool,) if isinstance(now, bool) else ()
    if isinstance(now, list):
        return (list,)
    return (int,) if isinstance(now, int) else (int, float) if isinstance(now, float) else ()


def _leaves(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _source_values(model: TinyModel) -> Any:
    """The values of all source elements, by address."""
    from safetensors.numpy import load_file

    tensors: dict[str, Any] = {}
    for file in model.source.files:
        tensors |= load_file(model.source.directory / file.name)
    return np.concatenate(
        [np.zeros(1, np.float32), *(tensors[name].reshape(-1) for name in model.book.shapes)]
    )


def _sources_of(rule: Rule, model: TinyModel) -> list[str]:
    """Modules the rule's tensors are made of and that the source has."""
    names = [name for axis in (*rule.weight, *rule.bias) for name, _ in axis.sources]
    return [n for n in dict.fromkeys(names) if f"{n}.weight" in model.book.shapes]


def _orders(rule: Rule, made: Tensors, heads: Heads) -> Iterator[tuple[str, Tensors]]:
    """The rule's tensors with their rows in the order they had without a known mistake."""
    if not rule.experts:
        yield from _row_orders(rule, made, heads)
        return
    # With the experts behind the rows, what is done to the rows is done to those of each expert.
    name = f"{rule.target}.weight"
    for text, changed in _row_orders(rule, {name: made[name].swapaxes(0, 1)}, heads):
        yield text, {name: np.ascontiguousarray(changed[name].swapaxes(0, 1))}


def _row_orders(rule: Rule, made: Tensors, heads: Heads) -> Iterator[tuple[str, Tensors]]:
    names = [n for n in (f"{rule.target}.weight", f"{rule.target}.bias") if n in made]
    rows = len(made[names[0]])
    index = np.arange(rows, dtype=np.uint32)[:, None]
    if rule.target.endswith("attention.qkv"):
        for text, _, mistaken in qkv_candidates([index], heads):
            yield text, _undone(names, made, mistaken[0][:, 0])
        yield from _heads_exchanged(names, made, heads)
    elif rule.target.endswith("mlp.fc"):
        for text, _, mistaken in fc_candidates([index], heads):
            yield text, _undone(names, made, mistaken[0][:, 0])
        yield from _halves(names, made, rows)
    elif rule.target.endswith("attention.dense"):
        name = names[0]
        units = made[name].reshape(rows, heads.heads, heads.size)
        for a, b in combinations(range(heads.heads), 2):
            order = _exchanged(heads.heads, a, b)
            text = f"the columns of heads {a} and {b} are exchanged"
            yield text, {name: units[:, order].reshape(made[name].shape)}
    for kind in names:
        yield (
            f"the rows of its {kind.rpartition('.')[2]} stand in reverse order",
            {kind: made[kind][::-1]},
        )


def _undone(names: list[str], made: Tensors, mistake: Any) -> Tensors:
    back = np.argsort(mistake)
    return {name: made[name][back] for name in names}


def _halves(names: list[str], made: Tensors, rows: int) -> Iterator[tuple[str, Tensors]]:
    if rows % 2:
        return
    index = np.arange(rows)
    alternating = index.reshape(2, -1).T.reshape(-1)
    exchanged = np.roll(index, rows // 2)
    yield "its halves are exchanged", _undone(names, made, exchanged)
    yield "its rows alternate between two halves", _undone(names, made, alternating)
    yield (
        "its alternating rows are pulled apart into halves",
        {name: made[name][alternating] for name in names},
    )


def _heads_exchanged(
    names: list[str], made: Tensors, heads: Heads
) -> Iterator[tuple[str, Tensors]]:
    """Two heads of one kind in each other's place; then the halves that rotary pairs."""
    count = heads.heads + 2 * heads.kv_heads
    named: Callable[[int], str] = head_name(heads, 1)
    bounds = (0, heads.heads, heads.heads + heads.kv_heads, count)
    for start, stop in pairwise(bounds):
        for a, b in combinations(range(start, stop), 2):
            order = _unit_rows(_exchanged(count, a, b), heads.size)
            yield f"{named(a)} and {named(b)} are exchanged", {n: made[n][order] for n in names}
    if heads.size % 2 == 0:
        within = np.arange(heads.size).reshape(2, -1).T.reshape(-1)
        rotated = np.arange(heads.heads + heads.kv_heads)[:, None] * heads.size + within
        rest = np.arange(rotated.size, count * heads.size)
        order = np.concatenate([rotated.reshape(-1), rest])
        text = "the rows of each query and key head {} the order for rotary pairs"
        yield text.format("alternate instead of"), _undone(names, made, order)
        yield text.format("are in halves, not in"), {n: made[n][order] for n in names}


def _exchanged(count: int, a: int, b: int) -> Any:
    order = np.arange(count)
    order[[a, b]] = order[[b, a]]
    return order


def _unit_rows(units: Any, size: int) -> Any:
    return (units[:, None] * size + np.arange(size)).reshape(-1)
