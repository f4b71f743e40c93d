"""Compare TensorRT networks with the executor: every sub-module alone, in prompts and steps.

The executor runs in float32, and its states are put in the place of the network's own after each
sub-module, so that a wrong one shows where it is. How far apart rounding alone brings the two is
measured, not assumed: the executor's sub-modules, given the same inputs, in the network's dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phireg.executor import Executor, ModelSpec
from phireg.executor.sources import Source
from phireg.reader.tensors import rank_tensors
from phireg.tensorrt import network as contract
from phireg.tensorrt.interpreter import Interpreter, evaluate
from phireg.verification.logits import (
    Layer,
    check_reference,
    overall,
    quantized_parts,
    token_errors,
)
from phireg.verification.prompts import prompt_ids
from phireg.verification.result import Place, Problem, error_text, place_text

STEPS = 8
"""Tokens that follow each prompt one by one, through the caches."""

CHUNK = 512
"""Tokens of a prompt that are evaluated at a time."""

_FACTOR = 4.0
"""By which a network's error may exceed that of the executor in the network's dtype."""

_FLOORS = {torch.float32: 1e-4, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Errors that are never too large: sums in another order, a few units of rounding."""

_QUANTIZED_FLOOR = 0.02
"""The same of a quantized sub-module: a value on the border between two of the grid's may fall to
either side; a mistake moves all of them."""


@dataclass(frozen=True, slots=True)
class PlaceError:
    """A sub-module's error where it exceeds most what is allowed, or comes nearest."""

    place: Place  # part: embedding, attention, mlp, residual or logits
    error: float
    allowed: float
    prompt: int  # tokens of the prompt
    steps: bool  # in the steps behind it, not in the prompt itself

    @property
    def wrong(self) -> bool:
        """The error is larger than rounding explains."""
        return not self.error <= self.allowed

    def problem(self, dtype: str) -> Problem:
        """Return the problem that it is in a network of that dtype."""
        phase = "the steps behind it" if self.steps else "the prompt"
        return Problem(
            place_text(self.place),
            f"in {dtype}, with {self.prompt} tokens, {phase}: off by {error_text(self.error)}; "
            f"rounding explains {error_text(self.allowed)}",
            "this is a defect in phireg's network; report it with the checkpoint's config.json",
            *self.place,
        )


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt with the tokens that follow it, the executor's states, and errors of each token."""

    ids: Tensor  # int64 [tokens]
    length: int  # of the prompt
    states: Mapping[Place, Tensor]  # float32 [tokens, hidden_size]; of logits, [tokens, vocab_size]
    rounding: Mapping[Place, Tensor]  # float32 [tokens]: the executor in the network's dtype
    errors: Mapping[Place, Tensor]  # the network, as far as it was evaluated

    def phases(self) -> tuple[tuple[bool, slice], ...]:
        """Return the tokens of the prompt, and those of the steps."""
        return (False, slice(self.length)), (True, slice(self.length, None))


def in_dtype(
    spec: ModelSpec, sources: Sequence[Source], dtype: str
) -> tuple[ModelSpec, list[Source]]:
    """Return a spec and sources whose 16-bit tensors have another dtype."""
    kind: torch.dtype = getattr(torch, dtype)

    def cast(source: Source) -> Source:
        def read(name: str) -> Tensor:
            tensor = source(name)
            return tensor.to(kind) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

        return read

    if dtype == spec.dtype:
        return spec, list(sources)
    return dataclasses.replace(spec, dtype=dtype), [cast(source) for source in sources]


def compare_network(
    package: object,
    networks: Sequence[contract.Network],
    sources: Sequence[Source],
    exact: Executor,
    rounded: Executor,
    lengths: Sequence[int],
    progress: Callable[[int], None] = lambda more: None,
) -> list[PlaceError]:
    """Evaluate the networks of all ranks on one batch of prompts, and ``STEPS`` tokens more.

    ``exact`` is the checkpoint in float32, ``rounded`` in the networks' dtype; ``sources`` read the
    tensors that networks have as inputs. No prompt of ``lengths`` tokens may cross, with those that
    follow, the length at which long rope changes its factors. Return the sub-modules' errors in the
    order of the computation.
    """
    rows = []
    for length in lengths:
        rows.append(_reference(exact, rounded, length))
        progress(1)
    run = _Run(package, networks, sources, rows)
    for starts, counts in contract.chunks(lengths, CHUNK):
        run.evaluate(starts, counts)
        progress(1)
    for step in range(STEPS):
        run.evaluate([row.length + step for row in rows], [1] * len(rows))
        progress(1)
    return list(_worst(networks[0].spec, rows))


def steps(lengths: Sequence[int]) -> int:
    """Return how often ``compare_network`` calls ``progress``."""
    return len(lengths) + len(list(contract.chunks(lengths, CHUNK))) + STEPS


def _reference(exact: Executor, rounded: Executor, length: int) -> _Row:
    """Compute the states of a random prompt and what follows it, and the rounding of each."""
    spec = exact.spec
    ids = prompt_ids(spec.vocab_size, length + STEPS)[0]
    states: dict[Place, Tensor] = {}

    def observe(layer: int, what: str, value: Tensor) -> None:
        part = "residual" if what == "hidden" else what
        states[None if layer < 0 else layer, part] = value[0]

    states[None, "logits"] = exact(ids[None], observe)[0]
    ends = rounded.end_weights()
    x = rounded.embed(ends, ids)
    outputs: dict[Place, Tensor] = {(None, "embedding"): x}
    for index in range(spec.num_layers):
        attention, mlp = (states[index, part].to(rounded.dtype) for part in ("attention", "mlp"))
        parts = Layer(rounded, index).parts(x[None], attention[None])
        outputs |= {(index, part): value[0] for part, value in parts.items()}
        outputs[index, "residual"] = x + attention + mlp
        x = states[index, "residual"].to(rounded.dtype)
    outputs[None, "logits"] = rounded.logits(ends, x[None])[0]
    for place in states:  # else everything would be allowed
        check_reference(place, states[place])
        check_reference(place, outputs[place])
    rounding = {place: token_errors(outputs[place], states[place]) for place in states}
    unknown = {place: torch.full((len(ids),), math.inf) for place in states}
    return _Row(ids, length, states, rounding, unknown)


def _worst(spec: ModelSpec, rows: Sequence[_Row]) -> Iterator[PlaceError]:
    """Yield the error of each place that exceeds what is allowed most."""
    quantized = bool(quantized_parts(spec.quantization))
    floor = _FLOORS[getattr(torch, spec.dtype)]

    def whole(errors: Tensor) -> float:
        return overall(errors) if quantized else float(errors.max())

    for place in rows[0].states:
        inside = quantized and place[1] in ("attention", "mlp")
        least = max(floor, _QUANTIZED_FLOOR) if inside else floor
        results = []
        for phase in (0, 1):
            parts = [row.phases()[phase] for row in rows]
            rounding = max(
                whole(r.rounding[place][at]) for r, (_, at) in zip(rows, parts, strict=True)
            )
            allowed = _FACTOR * rounding + least
            for row, (steps, at) in zip(rows, parts, strict=True):
                error = whole(row.errors[place][at])
                results.append(PlaceError(place, error, allowed, row.length, steps))
        yield max(results, key=lambda result: result.error / result.allowed)


class _Run:
    """The networks' evaluation over a batch, with its caches."""

    def __init__(
        self,
        package: object,
        networks: Sequence[contract.Network],
        sources: Sequence[Source],
        rows: Sequence[_Row],
    ) -> None:
        self.spec, self.capacity = networks[0].spec, networks[0].capacity
        self.rows = rows
        self._interpreters = [Interpreter(package, n.graph.network) for n in networks]
        names = rank_tensors(self.spec).keys()
        self._parameters = [
            {
                name: source(name).reshape(tuple(tensor.shape))
                for name, tensor in interpreter.inputs.items()
                if name in names
            }
            for interpreter, source in zip(self._interpreters, sources, strict=True)
        ]
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        shape = (len(rows), self.spec.rank_kv_heads, self.capacity, self.spec.head_size)
        self._pairs = [
            (contract.cache_name(part, layer), contract.present_name(part, layer))
            for layer in range(self.spec.num_layers)
            for part in "kv"
        ]
        self._caches = [
            {cache: torch.zeros(shape, dtype=dtype) for cache, _ in self._pairs} for _ in networks
        ]
        self._places: dict[str, Place] = {contract.EMBEDDED: (None, "embedding")}
        for layer in range(self.spec.num_layers):
            for part, name in (("attention",) * 2, ("mlp",) * 2, ("residual", "hidden")):
                self._places[contract.part_name(layer, name)] = (layer, part)

    def evaluate(self, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Give each row its next ``counts`` tokens, from ``starts`` on; padded on the right."""
        ids = torch.zeros(len(self.rows), max(counts), dtype=torch.int32)
        new = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        for number, (row, at) in enumerate(zip(self.rows, new, strict=True)):
            ids[number, : counts[number]] = row.ids[at]
        inputs = {
            contract.INPUT_IDS: ids,
            contract.PAST_LENGTHS: torch.tensor(starts, dtype=torch.int32),
            contract.LAST_TOKENS: torch.arange(ids.numel(), dtype=torch.int32),
        }
        if self.spec.rope.short is not None:
            long = [len(row.ids) > self.spec.rope.original for row in self.rows]
            inputs[contract.ROPE_OFFSETS] = torch.tensor(long, dtype=torch.int32) * self.capacity

        def observe(rank: int, name: str, value: Tensor) -> Tensor | None:
            place = self._places.get(name)
            return None if place is None else self._compared(place, value, new)

        pairs = zip(self._parameters, self._caches, strict=True)
        given = [parameters | inputs | kept for parameters, kept in pairs]
        outputs = evaluate(self._interpreters, given, observe)
        for kept, values in zip(self._caches, outputs, strict=True):
            self._compared((None, "logits"), values[contract.LOGITS], new)
            kept.update({cache: values[present] for cache, present in self._pairs})

    def _compared(self, place: Place, value: Tensor, new: Sequence[slice]) -> Tensor:
        """Compare a tensor [tokens, n]; return it with the executor's values in their places."""
        by_row = value.unflatten(0, (len(self.rows), -1)).clone()
        for actual, row, at in zip(by_row, self.rows, new, strict=True):
            expected = row.states[place]
            count = at.stop - at.start
            whole = expected.clone()  # errors are relative to all tokens, as the rounding is
            whole[at] = actual[:count].float()
            row.errors[place][at] = token_errors(whole, expected)[at]
            actual[:count] = expected[at]
        return by_row.flatten(0, 1)
