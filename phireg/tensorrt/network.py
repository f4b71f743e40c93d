"""The network of one rank: a decoder step over key/value caches, from the reader's description.

What a network takes and gives, with batch B, new tokens S, rows R of logits, cache slots C
(``capacity``), key/value heads G of a rank, head size D, vocabulary V, and the checkpoint's dtype:

=================  ==============  ===============================================================
input_ids          int32 [B, S]    the new tokens; rows that are shorter are padded on the right
past_lengths       int32 [B]       each row's tokens in the cache; its new ones go behind them
last_tokens        int32 [R]       of which tokens to give logits: row b's token t is b * S + t
rope_offsets       int32 [B]       only with long rope: 0 takes a row's short factors, C its long
cache_{k,v}_{i}    dtype [B,G,C,D] layer i's keys (rotated) and values
NAME               as stored       with ``separate``: every tensor of the rank file under its name
-----------------  --------------  ---------------------------------------------------------------
logits             float32 [R, V]  without the vocabulary's padding, of all ranks
present_{k,v}_{i}  dtype [B,G,C,D] the caches with the new tokens, in the buffers of cache_{k,v}_{i}
=================  ==============  ===============================================================

Token t of a row has the position ``past_lengths`` + t and sees the cache's slots up to it. What the
padding of a short row leaves behind its end is not seen, and the row's next tokens replace it; so a
long prompt may come in several steps, and generation is a step with S = 1. ``past_lengths`` + S
must be C at most: slots beyond are dropped without an error.

With long rope, keys stay in the cache as they were rotated. Every mask is explicit: engines that
took the lengths instead gave wrong tokens (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phireg.reader.spec import BlockSparse, ModelSpec, Rope
from phireg.reader.tensors import EMBEDDING, KV_SCALE, layer_prefix, rank_tensors
from phireg.tensorrt import mlp
from phireg.tensorrt.graph import Graph, Value
from phireg.tensorrt.linears import linear, through_grid
from phireg.tensorrt.package import Package
from phireg.tensorrt.parameters import Parameters

INPUT_IDS, PAST_LENGTHS, LAST_TOKENS, ROPE_OFFSETS = (
    "input_ids", "past_lengths", "last_tokens", "rope_offsets",
)  # fmt: skip
LOGITS = "logits"
BATCH, SEQUENCE, ROWS = "batch", "sequence", "rows"
"""Names of the dimensions that are chosen when an engine runs."""


EMBEDDED = "embedding"
"""The tensor of the embedded tokens, [tokens, hidden_size]."""


def part_name(layer: int, part: str) -> str:
    """Return the tensor of a layer's "attention" or "mlp" (outputs), or "hidden" (their sum)."""
    return f"{layer_prefix(layer)}{part}.output"


def cache_name(part: str, layer: int) -> str:
    """Return the input of a layer's keys ("k") or values ("v")."""
    return f"cache_{part}_{layer}"


def present_name(part: str, layer: int) -> str:
    """Return the output that is the input ``cache_name`` with the new tokens."""
    return f"present_{part}_{layer}"


def chunks(lengths: Sequence[int], size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield where each row of a batch of prompts starts and how many tokens it gives, by step.

    A row that has ended gives its last tokens once more: they are written as they are. All rows end
    in the last step.
    """
    longest = max(lengths)
    for start in range(0, longest, size):
        width = min(size, longest - start)
        starts = [min(start, max(0, length - width)) for length in lengths]
        pairs = zip(lengths, starts, strict=True)
        yield starts, [min(width, length - first) for length, first in pairs]


@dataclass(frozen=True, slots=True)
class Network:
    """A finished network of one rank, whose graph's constants must live until it is built."""

    graph: Graph
    spec: ModelSpec
    rank: int
    capacity: int


def build_network(
    package: Package,
    spec: ModelSpec,
    source: Callable[[str], Tensor] | None,
    *,
    rank: int = 0,
    capacity: int,
) -> Network:
    """Describe one rank's decoder to TensorRT.

    ``source`` reads a tensor of the rank file; None makes the tensors inputs. ``capacity`` is the
    slots of the caches: the most tokens of a row, prompt and continuation.
    """
    graph = Graph(package)
    _Decoder(graph, spec, Parameters(graph, rank_tensors(spec), source), rank, capacity).build()
    return Network(graph, spec, rank, capacity)


class _Decoder:
    """The tensors that all layers share, and the layers."""

    def __init__(
        self, graph: Graph, spec: ModelSpec, parameters: Parameters, rank: int, capacity: int
    ) -> None:
        self.graph, self.spec, self.parameters = graph, spec, parameters
        self.rank, self.capacity = rank, capacity
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._masks: dict[bool, Value] = {}
        ids = graph.input(INPUT_IDS, torch.int32, (BATCH, SEQUENCE))
        self.past = graph.input(PAST_LENGTHS, torch.int32, (BATCH,))
        self.last = graph.input(LAST_TOKENS, torch.int32, (ROWS,))
        shape = graph.add("shape", ids)
        self.batch, self.length = (
            graph.add("gather", shape, graph.integers(axis), 0) for axis in (0, 1)
        )
        self.tokens = graph.binary("PROD", self.batch, self.length)
        self.ids = graph.reshape(ids, (-1,))
        self.positions = self._positions()
        self.rope_positions, self.tables = self._rope()

    def build(self) -> None:
        graph, spec = self.graph, self.spec
        x = graph.add("gather", self.parameters.value(EMBEDDING), self.ids, 0)
        if spec.embedding_multiplier != 1:
            x = graph.binary("PROD", x, graph.scalar(spec.embedding_multiplier, x))
        graph.name(EMBEDDED, x)
        for index in range(spec.num_layers):
            x = self._layer(index, x)
            graph.name(part_name(index, "hidden"), x)
        x = graph.add("gather", x, self.last, 0)
        graph.output(LOGITS, self._logits(self._norm("transformer.ln_f", x)))

    def _layer(self, index: int, x: Value) -> Value:
        graph, spec, prefix = self.graph, self.spec, layer_prefix(index)
        u = self._norm(f"{prefix}input_layernorm", x)
        attended = self._attention(index, u)
        graph.name(part_name(index, "attention"), attended)
        x = graph.binary("SUM", x, attended)
        if spec.architecture.residual == "sequential":
            u = self._norm(f"{prefix}post_layernorm", x)
        if spec.experts is not None:
            part = mlp.mixture(graph, spec, self.parameters, prefix, self.rank, u)
            output = self._reduced(part)
        else:
            inner = mlp.activate(graph, spec, self._linear(f"{prefix}mlp.fc", u))
            output = self._row_linear(f"{prefix}mlp.proj", inner)
        graph.name(part_name(index, "mlp"), output)
        return graph.binary("SUM", x, output)

    def _attention(self, index: int, u: Value) -> Value:
        graph, spec, trt = self.graph, self.spec, self.graph.trt
        prefix, heads, kv_heads, size = (
            layer_prefix(index), spec.rank_heads, spec.rank_kv_heads, spec.head_size,
        )  # fmt: skip
        rows = self._linear(f"{prefix}attention.qkv", u)

        def part(first: int, count: int) -> Value:
            columns = graph.slice(rows, 1, first * size, count * size)
            shape = graph.shape_of(self.batch, self.length, count, size)
            return graph.reshape(columns, shape, after=(0, 2, 1, 3))

        query, key = self._rotated(part(0, heads)), self._rotated(part(heads, kv_heads))
        value = part(heads + kv_heads, kv_heads)
        # Scaled in float32, as scores are: attention has no scale of its own.
        query = graph.binary("PROD", query, graph.scalar(spec.attention_scale, query))
        query, key = graph.cast(query, self.dtype), graph.cast(key, self.dtype)
        if (grid := spec.quantization.kv_cache) is not None:
            # The cache has 16 bits all the same: no compiler takes an FP8 or INT8 one.
            scale = self.parameters.value(f"{prefix}{KV_SCALE}", ())
            key, value = (through_grid(graph, x, scale, grid) for x in (key, value))
        keys, values = self._cached(index, "k", key), self._cached(index, "v", value)
        layer = graph.layer(
            "attention_v2",
            query,
            keys,
            values,
            trt.AttentionNormalizationOp.SOFTMAX,
            trt.CausalMaskKind.NONE,
            name=f"{prefix}attention",
            mask=self._mask(spec.is_sparse(index)),
            decomposable=True,
        )
        attended = graph.reshape(
            layer.get_output(0), graph.shape_of(self.tokens, heads * size), before=(0, 2, 1, 3)
        )
        return self._row_linear(f"{prefix}attention.dense", attended)

    def _cached(self, index: int, part: str, new: Value) -> Value:
        """Write new keys or values into the cache; return all of it."""
        graph, spec = self.graph, self.spec
        shape = (BATCH, spec.rank_kv_heads, self.capacity, spec.head_size)
        cache = graph.input(cache_name(part, index), self.dtype, shape)
        mode = graph.trt.KVCacheMode.LINEAR
        present = graph.add("kv_cache_update", cache, new, self.past, mode)
        graph.output(present_name(part, index), present)
        return present

    def _positions(self) -> Value:
        """Return the position of every token, int32 [B, S]."""
        graph = self.graph
        fill = graph.layer("fill", (1,), graph.trt.FillOperation.LINSPACE, graph.trt.int32)
        for number, tensor in enumerate(
            (
                self.length,
                graph.constant(torch.zeros((), dtype=torch.int32)),
                graph.constant(torch.ones(1, dtype=torch.int32)),
            )
        ):
            fill.set_input(number, tensor)
        steps = graph.reshape(fill.get_output(0), (1, -1))
        return graph.binary("SUM", graph.reshape(self.past, (-1, 1)), steps)

    def _rope(self) -> tuple[Value, tuple[Value, Value]]:
        """Return the rows of the tables for every token, [B, S], and the tables of cos and sin."""
        graph, rope = self.graph, self.spec.rope
        cos, sin = rotary_tables(rope, self.capacity)
        tables = graph.constant(cos, "rotary_cos"), graph.constant(sin, "rotary_sin")
        if rope.short is None:
            return self.positions, tables
        offsets = graph.reshape(graph.input(ROPE_OFFSETS, torch.int32, (BATCH,)), (-1, 1))
        return graph.binary("SUM", self.positions, offsets), tables

    def _rotated(self, x: Value) -> Value:
        """Rotate the first dimensions of every head in float32, [B, heads, S, D]."""
        graph, spec = self.graph, self.spec
        dim = 0 if spec.rope.dim == spec.head_size else spec.rope.dim  # 0 is all of them
        wide = graph.cast(x, torch.float32)
        layer = graph.layer("rotary_embedding", wide, *self.tables, False, dim)
        layer.set_input(3, self.rope_positions)
        return layer.get_output(0)

    def _mask(self, sparse: bool) -> Value:
        """Return which slots a token sees, bool [B, 1 or heads, S, C]."""
        if sparse not in self._masks:
            graph = self.graph
            query = graph.reshape(self.positions, (0, 1, -1, 1))
            key = torch.arange(self.capacity, dtype=torch.int32).view(1, 1, 1, -1)
            seen = graph.unary("NOT", graph.binary("GREATER", graph.constant(key), query))
            if sparse and (pattern := self.spec.sparse) is not None:
                near = self._sparse_mask(pattern, query, key)
                seen = graph.binary("AND", seen, near)
            self._masks[sparse] = seen
        return self._masks[sparse]

    def _sparse_mask(self, pattern: BlockSparse, query: Value, key: Tensor) -> Value:
        """Return what the blocks let a token see, of heads that count from the model's first."""
        graph = self.graph
        block = key // pattern.block_size
        head = torch.arange(self.spec.rank_heads, dtype=torch.int32).view(1, -1, 1, 1)
        head += self.rank * self.spec.rank_heads
        stripe = (block + head * pattern.head_step + 1) % pattern.vertical_stride == 0
        own = graph.binary("FLOOR_DIV", query, graph.scalar(pattern.block_size, query))
        back = graph.binary("SUB", own, graph.constant(block))
        local = graph.binary("LESS", back, graph.scalar(pattern.num_local_blocks, back))
        return graph.binary("OR", local, graph.constant(stripe))

    def _norm(self, name: str, x: Value) -> Value:
        """Apply LayerNorm, or RMSNorm that is rounded before its weight, in float32."""
        graph, epsilon = self.graph, self.spec.norm_epsilon
        wide = graph.cast(x, torch.float32)
        weight = self.parameters.value(f"{name}.weight", (1, -1))
        if self.spec.architecture.norm == "layer_norm":
            bias = self.parameters.value(f"{name}.bias", (1, -1))
            weight, bias = (graph.cast(value, torch.float32) for value in (weight, bias))
            normal = graph.add("normalization_v2", wide, weight, bias, 2, epsilon=epsilon)
            return graph.cast(normal, self.dtype)
        mean = graph.reduce("AVG", graph.binary("PROD", wide, wide), 1)
        root = graph.unary("SQRT", graph.binary("SUM", mean, graph.scalar(epsilon, mean)))
        normal = graph.cast(graph.binary("DIV", wide, root), self.dtype)
        return graph.binary("PROD", normal, weight)

    def _linear(self, name: str, x: Value) -> Value:
        """Apply a linear whose outputs the ranks share out."""
        return self._biased(name, self._product(name, x))

    def _row_linear(self, name: str, x: Value) -> Value:
        """Apply a linear whose inputs the ranks share out; the bias comes after their sum."""
        return self._biased(name, self._reduced(self._product(name, x)))

    def _product(self, name: str, x: Value) -> Value:
        scheme = self.spec.quantization.scheme(name)
        return linear(self.graph, self.parameters, name, scheme.qformat if scheme else None, x)

    def _biased(self, name: str, x: Value) -> Value:
        if f"{name}.bias" not in self.parameters:
            return x
        return self.graph.binary("SUM", x, self.parameters.value(f"{name}.bias", (1, -1)))

    def _reduced(self, x: Value) -> Value:
        ranks, trt = self.spec.tp_size, self.graph.trt
        if ranks == 1:
            return x
        operation, reduction = trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.SUM
        return self.graph.add("dist_collective", x, operation, reduction, -1, list(range(ranks)))

    def _logits(self, u: Value) -> Value:
        graph, spec = self.graph, self.spec
        product = graph.product(u, self.parameters.value("lm_head.weight"))
        logits = self._biased("lm_head", product)
        if spec.tp_size > 1:
            logits = self._gathered(logits)
        logits = graph.cast(logits, torch.float32)
        if spec.logits_divisor != 1:
            logits = graph.binary("DIV", logits, graph.scalar(spec.logits_divisor, logits))
        return logits

    def _gathered(self, part: Value) -> Value:
        """Join all ranks' columns, without the padding of the last ones."""
        graph, trt, ranks = self.graph, self.graph.trt, self.spec.tp_size
        operation, reduction = trt.CollectiveOperation.ALL_GATHER, trt.ReduceOperation.NONE
        parts = graph.add(
            "dist_collective", part, operation, reduction, -1, list(range(ranks)), num_ranks=ranks
        )
        columns = self.spec.rank_vocab_size
        by_rank = graph.reshape(parts, (ranks, -1, columns))
        whole = graph.reshape(by_rank, (-1, ranks * columns), before=(1, 0, 2))
        if ranks * columns == self.spec.vocab_size:
            return whole
        return graph.slice(whole, 1, 0, self.spec.vocab_size)


def rotary_tables(rope: Rope, capacity: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin times mscale, float32: the rows of short factors, then of long ones."""
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    position = torch.arange(capacity, dtype=torch.float32)[:, None]
    cos, sin = [], []
    for factors, mscale in (
        ((1.0,) if rope.short is None else rope.short, rope.short_mscale),
        (rope.long, rope.long_mscale),
    ):
        if factors is not None:
            angle = position / (rope.base**exponent * torch.tensor(factors))
            cos.append(angle.cos() * mscale)
            sin.append(angle.sin() * mscale)
    return torch.cat(cos), torch.cat(sin)
