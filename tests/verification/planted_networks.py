"""Mistakes that a builder of networks could make, each planted alone."""

import dataclasses

import torch

from phireg.tensorrt import linears, mlp, network
from phireg.tensorrt.graph import Graph
from phireg.tensorrt.parameters import Parameters

Decoder = network._Decoder
PLANTED = {}


def plant(name, family, qformat=None, cache=None, tp_size=1):
    """Register a function (monkeypatch, spec) that plants a mistake; it may return another spec."""

    def register(function):
        PLANTED[name] = (family, (qformat, cache, tp_size), function)
        return function

    return register


def planted_spec(name, family, where=None, tp_size=1, **changes):
    """A mistake that is a spec with other values, of a block of it or its own."""

    def function(monkeypatch, spec):
        if where is None:
            return dataclasses.replace(spec, **changes)
        inner = dataclasses.replace(getattr(spec, where), **changes)
        return dataclasses.replace(spec, **{where: inner})

    plant(name, family, tp_size=tp_size)(function)


planted_spec("scores are not scaled", "phi3-mini", attention_scale=1.0)
planted_spec("scores are scaled as in dense models", "phi3-small", attention_scale=12**-0.5)
planted_spec("all dimensions rotate", "phi2", "rope", dim=20)
planted_spec("another base of the rotation", "phi3-medium", "rope", base=5001.0)
planted_spec("no mscale", "phi3-mini", "rope", short_mscale=1.0, long_mscale=1.0)
planted_spec("the short mscale for all", "phi3-small", "rope", long_mscale=1.1)
planted_spec("the default epsilon", "phi3-mini", norm_epsilon=1e-5)
planted_spec("no limit of gegelu", "phi3-small", gegelu_limit=None)
planted_spec("no embedding multiplier", "phi3-small", embedding_multiplier=1.0)
planted_spec("no divisor of logits", "phi3-small", logits_divisor=1.0)
planted_spec("one more local block", "phi3-small", "sparse", num_local_blocks=3)
planted_spec("the stripe of another stride", "phi3-small", "sparse", vertical_stride=4)
planted_spec("the other layers are dense", "phi3-small", "sparse", dense_every=3)


@plant("the mask shows one token ahead", "phi3-medium")
def ahead(monkeypatch, spec):
    original = Decoder._mask

    def mask(self, sparse):
        positions, self.positions = (
            self.positions,
            self.graph.binary("SUM", self.positions, self.graph.scalar(1, self.positions)),
        )
        seen = original(self, sparse)
        self.positions = positions
        return seen

    monkeypatch.setattr(Decoder, "_mask", mask)


@plant("the mask is aligned at the upper left", "phi3-medium")
def upper_left(monkeypatch, spec):
    original = Decoder._mask

    def mask(self, sparse):
        positions = self.positions
        first = self.graph.reshape(self.past, (-1, 1))
        self.positions = self.graph.binary("SUB", positions, first)
        seen = original(self, sparse)
        self.positions = positions
        return seen

    monkeypatch.setattr(Decoder, "_mask", mask)


@plant("the mask of another head", "phi3-small")
def other_head(monkeypatch, spec):
    original = Decoder._sparse_mask

    def sparse_mask(self, *arguments):
        self.rank += 1
        seen = original(self, *arguments)
        self.rank -= 1
        return seen

    monkeypatch.setattr(Decoder, "_sparse_mask", sparse_mask)


@plant("heads count from the rank's first", "phi3-small", tp_size=2)
def local_heads(monkeypatch, spec):
    original = Decoder._sparse_mask

    def sparse_mask(self, *arguments):
        rank, self.rank = self.rank, 0
        seen = original(self, *arguments)
        self.rank = rank
        return seen

    monkeypatch.setattr(Decoder, "_sparse_mask", sparse_mask)


def patch_layer(monkeypatch, kind, change):
    """Change the arguments of the layers of one kind."""
    original = Graph.layer

    def layer(self, method, /, *arguments, **settings):
        if method == kind:
            arguments, settings = change(self, arguments, settings)
        return original(self, method, *arguments, **settings)

    monkeypatch.setattr(Graph, "layer", layer)


@plant("keys and values are exchanged", "phi3-medium")
def exchanged(monkeypatch, spec):
    def change(graph, arguments, settings):
        query, key, value, *rest = arguments
        return (query, value, key, *rest), settings

    patch_layer(monkeypatch, "attention_v2", change)


@plant("one layer reads the keys of the cache as values", "phi2")
def keys_as_values(monkeypatch, spec):
    def change(graph, arguments, settings):
        query, key, value, *rest = arguments
        own = "layers.1." in settings["name"]
        return (query, key, key if own else value, *rest), settings

    patch_layer(monkeypatch, "attention_v2", change)


@plant("the cache is written one slot late", "phi3-mini")
def late(monkeypatch, spec):
    def change(graph, arguments, settings):
        cache, new, start, mode = arguments
        one = graph.constant(torch.ones(1, dtype=torch.int32))
        return (cache, new, graph.binary("SUM", start, one), mode), settings

    patch_layer(monkeypatch, "kv_cache_update", change)


@plant("neighbors are rotated together", "phi3-mini")
def interleaved(monkeypatch, spec):
    def change(graph, arguments, settings):
        x, cos, sin, _, dim = arguments
        return (x, cos, sin, True, dim), settings

    patch_layer(monkeypatch, "rotary_embedding", change)


@plant("keys are not rotated", "phi3-medium")
def unrotated(monkeypatch, spec):
    calls = []
    original = Decoder._rotated

    def rotated(self, x):
        calls.append(x)
        return original(self, x) if len(calls) % 2 else self.graph.cast(x, torch.float32)

    monkeypatch.setattr(Decoder, "_rotated", rotated)


@plant("long rope always takes the short factors", "phi3-mini")
def short_only(monkeypatch, spec):
    original = Decoder._rope

    def rope(self):
        _, tables = original(self)
        return self.positions, tables

    monkeypatch.setattr(Decoder, "_rope", rope)


@plant("the gate is the first half", "phi3-mini")
def gate_first(monkeypatch, spec):
    def activate(graph, spec, z):
        size = spec.rank_intermediate_size
        gate, up = graph.slice(z, 1, 0, size), graph.slice(z, 1, size, size)
        return graph.binary("PROD", mlp._silu(graph, gate), up)

    monkeypatch.setattr(mlp, "activate", activate)


@plant("gate and value of gegelu are exchanged", "phi3-small")
def value_first(monkeypatch, spec):
    original = Graph.slice

    def cut(self, value, axis, start, size, step=1):
        return original(self, value, axis, 1 - start if step == 2 else start, size, step)

    monkeypatch.setattr(Graph, "slice", cut)


@plant("the exact gelu", "phi2")
def exact_gelu(monkeypatch, spec):
    original = Graph.activation

    def activation(self, kind, value, **settings):
        return original(self, kind.replace("TANH", "ERF"), value, **settings)

    monkeypatch.setattr(Graph, "activation", activation)


@plant("no bias of row linears", "phi2")
def unbiased(monkeypatch, spec):
    monkeypatch.setattr(
        Decoder, "_row_linear", lambda self, name, x: self._reduced(self._product(name, x))
    )


@plant("each rank adds the bias of a row linear", "phi2", tp_size=2)
def doubly_biased(monkeypatch, spec):
    monkeypatch.setattr(
        Decoder,
        "_row_linear",
        lambda self, name, x: self._reduced(self._biased(name, self._product(name, x))),
    )


@plant("no final norm", "phi3-medium")
def unnormed(monkeypatch, spec):
    original = Decoder._norm
    monkeypatch.setattr(
        Decoder, "_norm", lambda self, n, x: x if n.endswith("ln_f") else original(self, n, x)
    )


def rename(monkeypatch, change):
    """Let parameters be read under other names."""
    original = Parameters.value
    monkeypatch.setattr(
        Parameters, "value", lambda self, name, shape=None: original(self, change(name), shape)
    )


@plant("the norms of a layer are exchanged", "phi3-small")
def exchanged_norms(monkeypatch, spec):
    names = {"input_layernorm": "post_layernorm", "post_layernorm": "input_layernorm"}
    rename(
        monkeypatch,
        lambda name: ".".join(names.get(part, part) for part in name.split(".")),
    )


@plant("a sequential residual", "phi2")
def sequential(monkeypatch, spec):
    rename(monkeypatch, lambda name: name.replace("post_layernorm", "input_layernorm"))
    architecture = dataclasses.replace(spec.architecture, residual="sequential")
    return dataclasses.replace(spec, architecture=architecture)


@plant("the activation scale of another linear", "phi3-mini", "fp8")
def other_scale(monkeypatch, spec):
    rename(
        monkeypatch,
        lambda name: name.replace("mlp.proj.activation_scaling", "mlp.fc.activation_scaling"),
    )


@plant("the weight's scale of another layer", "phi3-medium", "fp8")
def other_layer(monkeypatch, spec):
    rename(
        monkeypatch,
        lambda name: name.replace("layers.1.mlp.fc.weights_", "layers.2.mlp.fc.weights_"),
    )


@plant("scales of rows multiply columns", "phi3-medium", "int8_sq")
def other_axis(monkeypatch, spec):
    def change(graph, arguments, settings):
        square = settings.get("axis") == 0 and len({*arguments[0].shape}) == 1
        return arguments, {**settings, "axis": 1} if square else settings

    patch_layer(monkeypatch, "dequantize", change)


@plant("smoothing is forgotten", "phi2", "int8_sq")
def unsmoothed(monkeypatch, spec):
    original = Graph.binary

    def binary(self, operation, left, right):
        forgotten = right.name.endswith("prequant_scaling_factor")
        return left if forgotten else original(self, operation, left, right)

    monkeypatch.setattr(Graph, "binary", binary)


@plant("the cache is not quantized", "phi3-small", "fp8", "fp8")
def plain_cache(monkeypatch, spec):
    monkeypatch.setattr(network, "through_grid", lambda graph, x, scale, grid: x)


@plant("inputs are not quantized", "phi3-medium", "int8_sq")
def plain_inputs(monkeypatch, spec):
    monkeypatch.setattr(linears, "through_grid", lambda graph, x, scale, grid: x)


@plant("halves of packed bytes are exchanged", "phi3-mini", "int4_wo")
def nibbles(monkeypatch, spec):
    original = linears.pack_int4

    def pack(stored):
        packed = original(stored)
        return packed << 4 | packed >> 4

    monkeypatch.setattr(linears, "pack_int4", pack)
