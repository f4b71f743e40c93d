"""Evaluate a TensorRT network on the CPU, from the network object alone.

Every layer is read back through TensorRT's Python API (type, attributes, inputs, and weights from
the memory that TensorRT holds them by) and computed in torch after the descriptions of the layers
in NvInfer.h. Nothing here knows how phireg builds a network, so that agreement with the executor
says what the network means; what a GPU's compiled engine computes is not said by it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phireg.errors import CheckError
from phireg.tensorrt.memory import DTYPES, held_tensor

Observe = Callable[[int, str, Tensor], "Tensor | None"]
"""Takes a rank, and a tensor's name and value when it is computed; returns None, or what to go on
with instead."""

_Compute = Callable[..., Any]
"""Takes the layer's inputs, None where one is not set; returns its output, or a tuple of them."""

_ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    # Integers are divided toward zero, as in C.
    "DIV": lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
_UNARY = {"ABS": torch.abs, "NOT": torch.logical_not, "SQRT": torch.sqrt}
_ACTIVATIONS: dict[str, Callable[[float, float], _Compute]] = {
    "SIGMOID": lambda alpha, beta: torch.sigmoid,
    "CLIP": lambda alpha, beta: lambda x: x.clamp(alpha, beta),
    "GELU_ERF": lambda alpha, beta: functional.gelu,
    "GELU_TANH": lambda alpha, beta: functools.partial(functional.gelu, approximate="tanh"),
}
_REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "SUM": lambda x, dims, keep: x.sum(dims, keep),
    "AVG": lambda x, dims, keep: x.mean(dims, keep),
}
# The ends of the grids of quantized values; what lies beyond becomes the end.
_GRIDS = {"FP8": (-448, 448), "INT8": (-128, 127), "INT4": (-8, 7)}


@dataclass(frozen=True, slots=True)
class _Step:
    """A layer: it computes ``outputs`` from ``inputs`` (None where an input is not set)."""

    name: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    compute: _Compute | None  # None for a collective, which the ranks compute together
    joins: bool = False  # a collective joins the ranks' parts, or else adds them up


class Interpreter:
    """A network of ``package`` (tensorrt or tensorrt_rtx), read once and evaluated at will.

    What its constants point to must stay alive. A layer without a meaning here is a CheckError.
    """

    def __init__(self, package: Any, network: Any) -> None:
        self._package = package
        self._classes = {name.upper(): value for name, value in vars(package).items()}
        self.inputs = {t.name: t for t in map(network.get_input, range(network.num_inputs))}
        self.outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        layers = map(network.get_layer, range(network.num_layers))
        # The attributes of an attention are read at its output; its input has no output of its own.
        steps = [self._read(layer) for layer in layers if layer.type.name != "ATTENTION_INPUT"]
        self._steps = _ordered(steps)
        uses = Counter(name for step in steps for name in step.inputs if name is not None)
        self._uses = uses + Counter(self.outputs)

    def __call__(
        self, inputs: Mapping[str, Tensor], observe: Observe | None = None
    ) -> dict[str, Tensor]:
        """Return the outputs of the network of a model on one rank."""
        outputs: dict[str, Tensor] = evaluate([self], [inputs], observe)[0]
        return outputs

    def run(
        self, inputs: Mapping[str, Tensor], rank: int, observe: Observe | None
    ) -> Generator[tuple[bool, Tensor], Tensor | None, dict[str, Tensor]]:
        """Evaluate; at a collective, yield (joins, this rank's part) and be sent the result."""
        values: dict[str | None, Any] = {None: None}
        values.update(self._checked(inputs))
        left = Counter(self._uses)
        for step in self._steps:
            arguments = [values[name] for name in step.inputs]
            if step.compute is None:
                results = yield step.joins, arguments[0]
            else:
                results = step.compute(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            for name, dtype, result in zip(step.outputs, step.dtypes, results, strict=True):
                if result.dtype != dtype:
                    raise CheckError(f"layer {step.name} gives {result.dtype}, declared {dtype}")
                other = observe(rank, name, result) if observe is not None else None
                values[name] = result if other is None else other
            for used in filter(None, step.inputs):  # what is not read any more is freed
                left[used] -= 1
                if not left[used]:
                    del values[used]
        return {name: values[name] for name in self.outputs}

    def _checked(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        dtypes = {name: value.dtype for name, value in inputs.items()}
        declared = {name: DTYPES[tensor.dtype.name] for name, tensor in self.inputs.items()}
        if dtypes != declared:
            raise ValueError(f"inputs {dtypes}, but the network declares {declared}")
        return inputs

    def _read(self, layer: Any) -> _Step:
        kind, name = layer.type.name, layer.name
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        dtypes = tuple(DTYPES[tensor.dtype.name] for tensor in outputs)
        reader: Any = _SIMPLE.get(kind) or getattr(self, f"_{kind.lower()}", None)
        _require(layer, reader is not None, kind)
        # get_layer gives the base class, which hides a layer's own attributes.
        layer.__class__ = self._classes[f"I{kind}Layer".replace("_", "").upper()]
        compute = reader(layer)
        if kind == "ATTENTION_OUTPUT":
            attention = layer.attention
            tensors = [*map(attention.get_input, range(3)), attention.mask]
        names = tuple(None if tensor is None else tensor.name for tensor in tensors)
        # The bindings do not give a collective's operation back.
        joins = kind == "DIST_COLLECTIVE" and (
            layer.num_ranks > 1 or tuple(tensors[0].shape) != tuple(outputs[0].shape)
        )
        return _Step(name, names, tuple(t.name for t in outputs), dtypes, compute, joins)

    # What each type of layer computes, after NvInfer.h.

    def _constant(self, layer: Any) -> _Compute:
        value = held_tensor(self._package, layer.weights, tuple(layer.shape))
        return lambda: value

    def _shuffle(self, layer: Any) -> _Compute:
        first, second = tuple(layer.first_transpose), tuple(layer.second_transpose)
        static = _dims(layer, "reshape_dims") if layer.num_inputs == 1 else ()
        copies = layer.zero_is_placeholder

        def compute(x: Tensor, sizes: Tensor | None = None) -> Tensor:
            x = x.permute(first[: x.ndim])
            shape = static if sizes is None else sizes.tolist()
            pairs = enumerate(shape or x.shape)
            x = x.reshape([x.shape[i] if n == 0 and copies else n for i, n in pairs])
            return x.permute(second[: x.ndim])

        return compute

    def _slice(self, layer: Any) -> _Compute:
        _require(layer, layer.mode.name == "STRICT_BOUNDS", layer.mode)

        def compute(x: Tensor, *given: Tensor | None) -> Tensor:
            # Inputs: start, size, stride, the value to fill with, axes.
            inputs = dict(zip(("start", "shape", "stride", "value", "axes"), given, strict=False))
            start, size, stride, axes = (
                _dims(layer, part) if (tensor := inputs.get(part)) is None else tensor.tolist()
                for part in ("start", "shape", "stride", "axes")
            )
            for at, axis in enumerate(axes or range(x.ndim)):
                index = torch.arange(size[at]) * stride[at] + start[at]
                x = x.index_select(axis, index)  # out of range is an error
            return x

        return compute

    def _gather(self, layer: Any) -> _Compute:
        axis, mode = layer.axis, layer.mode
        _require(layer, mode.name == "DEFAULT" and not layer.num_elementwise_dims, mode)
        return lambda x, index: x.index_select(axis, index.flatten().long()).unflatten(
            axis, index.shape
        )

    def _normalization(self, layer: Any) -> _Compute:
        axes, epsilon = _axes(layer.axes), layer.epsilon

        def compute(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            centered = x.float() - x.float().mean(axes, True)
            deviation = (centered.square().mean(axes, True) + epsilon).sqrt()
            return (centered / deviation * scale.float() + bias.float()).to(x.dtype)

        return compute

    def _rotary_embedding(self, layer: Any) -> _Compute:
        interleaved, dim = layer.interleaved, layer.rotary_embedding_dim

        def compute(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
            if positions is not None:
                cos, sin = cos[positions.long()], sin[positions.long()]
            cos, sin = cos[:, None].float(), sin[:, None].float()
            size = dim or x.shape[-1]
            pairs = x[..., :size].float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
            side = -1 if interleaved else -2
            left, right = pairs.unbind(side)
            turned = torch.stack((left * cos - right * sin, right * cos + left * sin), side)
            return torch.cat((turned.flatten(-2).to(x.dtype), x[..., size:]), dim=-1)

        return compute

    def _kv_cache_update(self, layer: Any) -> _Compute:
        _require(layer, layer.update_form.name == "PADDED_BHND", layer.update_form)

        def compute(cache: Tensor, update: Tensor, start: Tensor) -> Tensor:
            cache = cache.clone()
            for row, first in enumerate(start.tolist()):
                last = first + update.shape[2]
                if not 0 <= first <= last <= cache.shape[2]:  # TensorRT ignores it silently
                    raise CheckError(f"layer {layer.name} writes slots {first} to {last - 1}")
                cache[row, :, first:last] = update[row]
            return cache

        return compute

    def _attention_output(self, layer: Any) -> _Compute:
        attention = layer.attention
        for form in (attention.query_form, attention.key_value_form):
            _require(layer, form.name == "PADDED_BHND", form)
        for name in ("key_value_lengths", "query_lengths", "normalization_quantize_scale"):
            _require(layer, getattr(attention, name) is None, name)
        softmax, causal = attention.norm_op.name == "SOFTMAX", attention.causal_kind.name

        def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            group = query.shape[1] // key.shape[1]
            keys, values = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
            scores = query.float() @ keys.mT  # the layer has no scale of its own
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            elif mask is not None:
                scores = scores + mask
            if causal != "NONE":
                rows, columns = scores.shape[-2:]
                ahead = columns - rows if causal == "LOWER_RIGHT" else 0
                seen = torch.ones(rows, columns, dtype=torch.bool).tril(ahead)
                scores = scores.masked_fill(~seen, -torch.inf)
            return ((scores.softmax(-1) if softmax else scores) @ values).to(query.dtype)

        return compute

    def _quantize(self, layer: Any) -> _Compute:
        axis, dtype = layer.axis, layer.to_type.name
        low, high = _known(_GRIDS, layer, layer.to_type)

        def compute(x: Tensor, scale: Tensor) -> Tensor:
            scaled = (x.float() / _along(scale.float(), axis, x)).clamp(low, high)
            return (scaled if dtype == "FP8" else scaled.round()).to(DTYPES[dtype])

        return compute

    def _fill(self, layer: Any) -> _Compute:
        _require(layer, layer.operation.name == "LINSPACE", layer.operation)
        dtype = DTYPES[layer.get_output(0).dtype.name]

        def compute(
            shape: Tensor | None = None, first: Tensor | None = None, step: Tensor | None = None
        ) -> Tensor:
            (length,) = layer.shape if shape is None else shape.tolist()  # one dimension
            start = layer.alpha if first is None else first
            return (start + torch.arange(length) * (layer.beta if step is None else step)).to(dtype)

        return compute


_SIMPLE: dict[str, Callable[[Any], _Compute | None]] = {
    "ACTIVATION": lambda layer: _known(_ACTIVATIONS, layer, layer.type)(layer.alpha, layer.beta),
    "CAST": lambda layer: functools.partial(torch.Tensor.to, dtype=DTYPES[layer.to_type.name]),
    "CONCATENATION": lambda layer: lambda *parts: torch.cat(parts, dim=layer.axis),
    "DEQUANTIZE": (
        lambda layer: (
            lambda x, scale: (x.float() * _along(scale.float(), layer.axis, x)).to(
                DTYPES[layer.to_type.name]
            )
        )
    ),
    "DIST_COLLECTIVE": lambda layer: None,
    "ELEMENTWISE": lambda layer: _known(_ELEMENTWISE, layer, layer.op),
    "IDENTITY": lambda layer: lambda x: x,
    "MATRIX_MULTIPLY": (
        lambda layer: lambda a, b: _transposed(a, layer.op0) @ _transposed(b, layer.op1)
    ),
    "REDUCE": (
        lambda layer: (
            lambda x: _known(_REDUCE, layer, layer.op)(x, _axes(layer.axes), layer.keep_dims)
        )
    ),
    "SELECT": lambda layer: torch.where,
    "SHAPE": lambda layer: lambda x: torch.tensor(x.shape, dtype=torch.int64),
    "SOFTMAX": lambda layer: lambda x: x.softmax(*_axes(layer.axes)),
    "SQUEEZE": lambda layer: lambda x, axes: x.squeeze(tuple(axes.tolist())),
    "TOPK": lambda layer: lambda x: _topk(x, layer),
    "UNARY": lambda layer: _known(_UNARY, layer, layer.op),
    "UNSQUEEZE": lambda layer: lambda x, axes: functools.reduce(torch.unsqueeze, axes.tolist(), x),
}


@torch.no_grad()  # type: ignore[untyped-decorator]
def evaluate(
    ranks: Sequence[Interpreter],
    inputs: Sequence[Mapping[str, Tensor]],
    observe: Observe | None = None,
) -> list[dict[str, Tensor]]:
    """Return the outputs of all ranks' networks, in lockstep; collectives add or join parts."""
    pairs = zip(ranks, inputs, strict=True)
    runs = [network.run(given, rank, observe) for rank, (network, given) in enumerate(pairs)]
    result: Tensor | None = None
    while True:
        parts, outputs = [], []
        for run in runs:
            try:
                parts.append(run.send(result))
            except StopIteration as end:
                outputs.append(end.value)
        if not parts:
            return outputs
        if outputs or len({joins for joins, _ in parts}) > 1:
            raise CheckError("the ranks' networks have different collectives")
        tensors = [part for _, part in parts]
        result = torch.cat(tensors) if parts[0][0] else torch.stack(tensors).sum(0)


def _ordered(steps: Sequence[_Step]) -> list[_Step]:
    """Order steps so that each follows those it reads from: layers come as they were made."""
    producers = {name: step for step in steps for name in step.outputs}
    before = {
        step.name: {producers[n].name for n in step.inputs if n in producers} for step in steps
    }
    by_name = {step.name: step for step in steps}
    return [by_name[name] for name in TopologicalSorter(before).static_order()]


def _topk(x: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
    values, indices = x.topk(layer.k, *_axes(layer.axes), largest=layer.op.name == "MAX")
    return values, indices.to(DTYPES[layer.get_output(1).dtype.name])


def _transposed(x: Tensor, operation: Any) -> Tensor:
    return x.mT if operation.name == "TRANSPOSE" else x


def _known(table: Mapping[str, Any], layer: Any, value: Any) -> Any:
    _require(layer, value.name in table, value)
    return table[value.name]


def _require(layer: Any, condition: bool, value: object) -> None:
    if not condition:
        raise CheckError(f"layer {layer.name}: the interpreter has no meaning for {value}")


def _axes(mask: int) -> list[int]:
    return [axis for axis in range(mask.bit_length()) if mask >> axis & 1]


def _dims(layer: Any, attribute: str) -> tuple[int, ...]:
    """Return static dimensions; () if they were not set, or come by an input."""
    try:
        return tuple(getattr(layer, attribute))
    except (TypeError, ValueError):  # how the bindings say that there are none
        return ()


def _along(scale: Tensor, axis: int, x: Tensor) -> Tensor:
    """Shape a scale for broadcasting: scalar, one to each index of ``axis``, or blocks of x."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1:
        return scale.view([-1 if i == axis else 1 for i in range(x.ndim)])
    for dimension, size in enumerate(x.shape):
        scale = scale.repeat_interleave(size // scale.shape[dimension], dim=dimension)
    return scale
