"""Maxima of activations: the source model's layers one after the other, each over all samples.

Each layer's weights are read once and one layer is in memory at a time. lm_head is not computed,
but its inputs are, unless it is the embedding.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from phireg.calibration.awq import PASSES, Search
from phireg.calibration.statistics import Statistics, of_any_expert
from phireg.device import measure_memory, peak_memory
from phireg.errors import SourceError
from phireg.reference.load import Reference
from phireg.reference.observing import hidden_states, inputs_seen

Progress = Callable[[int, int], None]
"""Takes (further tokens through one layer, all of them)."""

Rows = Sequence[Sequence[int]]

_EMBEDDING = "model.embed_tokens."

GPU_TOKENS = 16384
"""Tokens that run at once on a GPU, if its memory takes them: more make it no faster."""


def collect(
    reference: Reference,
    rows: Rows,
    *,
    device: torch.device,
    batch_size: int | None = None,
    progress: Progress | None = None,
    search: bool = False,
) -> Statistics:
    """Collect maxima of the inputs of every linear, and of keys and values.

    With ``search`` also AWQ's factors: every layer runs a second time, on the same inputs, when the
    mean magnitudes of its linears' inputs are known.

    Rows run as they are, without padding; up to ``batch_size`` rows of the same length run at once:
    by default one on a CPU, and on a GPU as many as have ``GPU_TOKENS`` and fit into its memory.
    Masks and rotary tables are the model's own for that length, so a row beyond the original
    context takes long rope's long factors as it does in the model. Keys are recorded after the
    rotary embedding, as a cache gets them.

    Between two layers the hidden states of all rows are in memory, on ``device`` and in the compute
    dtype: tokens x hidden_size x 2 bytes in 16 bits (512 rows of 512 tokens of Phi-3-mini: 1.6 GB).

    ``reference`` comes from ``open_reference`` with no weights read yet; none are left in memory.
    The provenance of the maxima has the largest batch alone. The maxima of an expert that no token
    was sent to are zero. A SourceError names any other linear that saw no token, or a maximum that
    is not finite.
    """
    model, layers = reference.model, reference.model.model.layers
    report = progress or (lambda more, total: None)
    total = sum(map(len, rows)) * len(layers) * (1 + PASSES if search else 1)
    largest = _Largest(averaged=search)
    smoothers: dict[str, NDArray[np.float32]] = {}
    with torch.no_grad(), reference.parameters.held(_EMBEDDING):
        tokens = 0 if batch_size else _tokens_at_once(reference, rows, device)
        groups = _groups(rows, batch_size, tokens)
        cache = _recording_cache(largest.cached)
        batches = [torch.tensor(group, device=device) for group in groups]
        states = [_front(model, ids, cache).hidden for ids in batches]
        for index, layer in enumerate(layers):
            prefix = f"model.layers.{index}."
            ahead = device.type == "cuda"
            with reference.layer(index, ahead=ahead):
                with largest.watching(layer, prefix):
                    for number, front in enumerate(_fronts(model, batches, cache)):
                        output = front.run(layer, states[number])
                        if not search:
                            states[number] = output
                        report(batches[number].numel(), total)
                means = largest.settle(index, len(rows))  # which also waits for the GPU
                if search:
                    awq = Search(linears_of(layer, prefix), means)
                    with awq.watching():
                        for number, front in enumerate(_fronts(model, batches, None)):
                            states[number] = front.run(layer, states[number])
                            awq.compare()
                            report(batches[number].numel() * PASSES, total)
                    smoothers |= awq.best()
        if not model.config.tie_word_embeddings:
            name = "norm" if hasattr(model.model, "norm") else "final_layernorm"
            with reference.parameters.held(f"model.{name}."):
                for hidden in states:  # the norm before lm_head
                    largest.record("lm_head", getattr(model.model, name)(hidden))
            largest.settle(len(layers) - 1, len(rows))
    inputs, factors = (
        {
            source: values
            for name, values in found.items()
            for source in reference.parameters.source_modules(name)
        }
        for found in (largest.inputs, smoothers)
    )
    provenance = {"batch_size": max(len(ids) for ids in batches)}
    return Statistics(inputs, largest.of("key"), largest.of("value"), provenance, factors)


def linears_of(layer: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The linears of a layer by their names in the model."""
    modules = layer.named_modules()
    return {prefix + name: module for name, module in modules if isinstance(module, nn.Linear)}


def _fronts(model: Any, batches: Sequence[Tensor], cache: Any) -> Iterator[_Front]:
    """What the first layer gets for each batch; batches of one shape share it."""
    front, shape = None, None
    for ids in batches:
        if front is None or ids.shape != shape:
            front, shape = _front(model, ids, cache), ids.shape
        yield front


def _tokens_at_once(reference: Reference, rows: Rows, device: torch.device) -> int:
    """How many tokens half of the GPU's free memory takes, by the longest row; none on a CPU."""
    if device.type == "cpu":
        return 0
    longest = torch.tensor([max(rows, key=len)], device=device)
    front = _front(reference.model, longest, None)
    with reference.layer(0) as layer:
        measure_memory(device)
        before = torch.cuda.memory_allocated(device)
        front.run(layer, front.hidden)
        each = (peak_memory(device) - before) / longest.numel()
    unused = torch.cuda.memory_reserved(device) - before
    states = front.hidden.nbytes / longest.numel() * sum(map(len, rows))
    free = (torch.cuda.mem_get_info(device)[0] + unused) / 2 - states
    return min(GPU_TOKENS, int(free / each))


@dataclass(frozen=True, slots=True)
class Cost:
    """Time that :func:`collect` takes, in seconds."""

    reading: float  # all layers' weights
    token: float  # one token through all layers

    def of(self, tokens: int) -> float:
        """Seconds for so many tokens."""
        return self.reading + self.token * tokens


def measure(reference: Reference, rows: Rows, *, device: torch.device, batch_size: int) -> Cost:
    """Time one layer on one batch of rows of average length; arguments as for :func:`collect`."""
    layers = len(reference.model.model.layers)
    typical = sorted(rows, key=len)[len(rows) // 2]
    ids = torch.tensor([typical] * min(batch_size, len(rows)), device=device)
    with torch.no_grad(), reference.parameters.held(_EMBEDDING):
        front = _front(reference.model, ids, None)
        started = time.perf_counter()
        with reference.layer(0) as layer:
            read = time.perf_counter() - started
            front.run(layer, front.hidden)  # the first run also starts threads and kernels
            _wait(device)
            started = time.perf_counter()
            front.run(layer, front.hidden)
            _wait(device)
            ran = time.perf_counter() - started
    return Cost(layers * read, layers * ran / ids.numel())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _groups(rows: Rows, batch_size: int | None, tokens: int) -> Iterator[list[Sequence[int]]]:
    """Rows of one length together, so many at most or of so many tokens; the shortest first."""
    lengths: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        lengths.setdefault(len(row), []).append(row)
    for length, alike in sorted(lengths.items()):
        most = batch_size or max(1, tokens // length)
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


@dataclass(frozen=True, slots=True)
class _Front:
    """The arguments that a decoder passes to its first layer."""

    hidden: Tensor
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Call a layer as the decoder would, with other hidden states of the same shape."""
        return hidden_states(layer(hidden, *self.arguments, **self.named))


class _ReachedError(Exception):
    """Ends a forward pass at the first layer."""

    def __init__(self, front: _Front) -> None:
        super().__init__()
        self.front = front


def _front(model: Any, ids: Tensor, cache: Any) -> _Front:
    """Run the model up to its first layer, anew for every layer: all rows' masks take memory."""

    def stop(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        hidden = arguments[0] if arguments else named.pop("hidden_states")
        raise _ReachedError(_Front(hidden, arguments[1:], named))

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids, use_cache=cache is not None, **{_cache_name(model): cache})
    except _ReachedError as reached:
        return reached.front
    finally:
        handle.remove()
    raise AssertionError("the model did not call its first layer")


def _cache_name(model: Any) -> str:
    """The name of the cache in the model's ``forward``: transformers has used two."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _recording_cache(record: Callable[[int, Tensor, Tensor], None]) -> Any:
    """A cache for transformers' attention classes that records its inputs and keeps nothing."""
    from transformers import DynamicCache

    class Recording(DynamicCache):  # type: ignore[misc]
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            record(layer_idx, key_states, value_states)
            return key_states, value_states

    return Recording()


class _Largest:
    """Running maxima; if ``averaged``, also sums over rows of the rows' mean magnitudes."""

    def __init__(self, *, averaged: bool) -> None:
        self.inputs: dict[str, NDArray[np.float32]] = {}
        self._averaged = averaged
        self._running: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}  # input features of the linears that are watched
        self._cached: dict[tuple[str, int], Tensor] = {}

    def cached(self, layer: int, key: Tensor, value: Tensor) -> None:
        for what, states in (("key", key), ("value", value)):
            amax = states.abs().amax()
            before = self._cached.get((what, layer), amax)
            self._cached[what, layer] = torch.maximum(before, amax)

    def record(self, name: str, inputs: Tensor) -> None:
        magnitudes = inputs.detach().abs()
        amax = magnitudes.flatten(0, -2).amax(0)
        before = self._running.get(name, amax)
        self._running[name] = torch.maximum(before, amax)
        if self._averaged:
            means = magnitudes.mean(-2).float()  # rounded row by row: batches do not show
            self._sums[name] = self._sums.get(name, 0) + means.sum(0)

    @contextmanager
    def watching(self, layer: nn.Module, prefix: str) -> Iterator[None]:
        linears = linears_of(layer, prefix)
        self._sizes |= {name: linear.in_features for name, linear in linears.items()}
        with inputs_seen(linears, self.record):
            yield

    def settle(self, layer: int, rows: int) -> dict[str, Tensor]:
        """Check a layer's maxima and move them to main memory; return means over ``rows`` rows."""
        seen = set(map(of_any_expert, self._running)) - {None}
        unseen = {name: size for name, size in self._sizes.items() if name not in self._running}
        if dead := [name for name in unseen if of_any_expert(name) not in seen]:
            raise SourceError(f"calibration: no token went through {', '.join(dead)}")
        # Experts that no token was sent to; others were.
        self.inputs |= {name: np.zeros(size, np.float32) for name, size in unseen.items()}
        for name, running in self._running.items():  # in the order in which the model gets there
            amax = running.float().cpu()
            if not bool(amax.isfinite().all()):
                channel = int((~amax.isfinite()).int().argmax())
                raise SourceError(
                    f"calibration: the input of {name} is {amax[channel]} in channel {channel}, "
                    f"computed in {running.dtype}",
                    hint="float16 ends at 65,504: calibrate with --device cpu, which computes in "
                    "float32."
                    if running.dtype == torch.float16
                    else "a weight may be NaN or infinite: phireg convert counts such values.",
                )
            self.inputs[name] = amax.numpy()
        for what in ("key", "value"):
            if (what, layer) not in self._cached:
                raise SourceError(f"calibration: no {what} of layer {layer} reached the cache")
        means = {name: sums / rows for name, sums in self._sums.items()}
        for finished in (self._running, self._sums, self._sizes):
            finished.clear()
        return means

    def of(self, what: str) -> tuple[float, ...]:
        maxima = {layer: float(x) for (kind, layer), x in self._cached.items() if kind == what}
        return tuple(maxima[layer] for layer in range(len(maxima)))
