"""A batch's static key/value cache, and the two ways tokens enter it: a prompt, then steps."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phireg.errors import UsageError
from phireg.executor import attention, blocks, quantized
from phireg.executor.blocks import Attend, AttendCache, Cache, Rotary
from phireg.executor.finite import NO_TOKEN, finite
from phireg.executor.model import Executor
from phireg.reader.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from its logits: greedily, or drawn at random.

    Attributes:
        temperature: the logits are divided by this; 0 takes the most likely token, always.
        top_k: draw among so many most likely tokens; 0 is all.
        top_p: of these, among the fewest that hold this probability together; 1 is all.
        seed: the same seed, batch and device draw the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: "
                "one is out of range",
                hint="temperature and top_k are 0 or more, top_p is above 0 and at most 1",
            )

    @property
    def greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature == 0

    @property
    def divisor(self) -> float:
        """The temperature, as far as float32 can divide by it; below, the best token is drawn."""
        return max(self.temperature, float(torch.finfo(torch.float32).tiny))


def choose(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Return the next token of every row, int64 [batch], without leaving the device.

    It is ``NO_TOKEN`` in rows whose logits are not finite.

    ``logits`` are float32 [batch, vocab_size]; ``noise`` of the same shape is drawn from the
    exponential distribution with mean 1, for which the largest p / noise is a token drawn with
    probability p. Greedy sampling does not use it.
    """
    unusable = ~finite(logits)
    if sampling.greedy:
        return logits.argmax(dim=-1).masked_fill(unusable, NO_TOKEN)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.divisor
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probability = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the more likely tokens hold together
        kept = ordered.masked_fill(before >= sampling.top_p, 0)
        probability = torch.zeros_like(probability).scatter(-1, order, kept)
    return (probability / noise).argmax(dim=-1).masked_fill(unusable, NO_TOKEN)


class Decoder:
    """Generate for one batch at a time; a later batch of the same shape can follow.

    The cache has ``capacity`` slots: prompt and new tokens together, padding included. A quantized
    cache holds levels of the layer's grid, or, without ``fused``, the values they give back. The
    seed of ``sampling`` is given with each prompt.

    ``fused`` runs the layers as the kernels of ``cuda.fused``; a step of weights that stay on the
    GPU is captured in a CUDA graph besides, with what NCCL sends in it.

    With long rope, each row takes the short or the long factors by its own tokens so far (a prompt:
    its length; a step: the row's tokens in the cache and the new one), whatever the others have.
    Keys already in the cache stay as they were rotated when that changes, as in TensorRT-LLM.
    """

    def __init__(
        self, executor: Executor, batch: int, capacity: int, sampling: Sampling, *, fused: bool
    ) -> None:
        spec, device = executor.spec, executor.device
        # The executor keeps this decoder: a reference back would keep both of them for ever.
        self.executor: Executor = weakref.proxy(executor)  # type: ignore[assignment]
        self.dtype = executor.dtype
        self.batch = batch
        self.capacity = capacity
        self.sampling = sampling
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._fused = fused
        self._capturable = fused and device.type == "cuda" and not executor.offload
        self._length = 0
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._pads = torch.zeros(batch, dtype=torch.int64, device=device)
        self._random = torch.Generator(device)
        columns = 0 if sampling.greedy else spec.vocab_size
        self._noise = torch.ones(batch, columns, dtype=torch.float32, device=device)
        shape = (batch, spec.rank_kv_heads, capacity, spec.head_size)
        grid, dtype = spec.quantization.kv_cache, executor.dtype
        if fused and grid is not None and quantized.keeps_levels(device, grid):
            dtype = torch.int8 if grid == "int8" else torch.float8_e4m3fn

        def cache() -> Cache:
            keys = torch.zeros(shape, dtype=dtype, device=device)
            return keys, torch.zeros_like(keys)

        self._caches = [[cache() for _ in executor.ranks] for _ in range(spec.num_layers)]
        tables = [blocks.rotary_tables(spec.rope, capacity, long, device) for long in (False, True)]
        self._tables: Rotary = (
            torch.stack([cos for cos, _ in tables]),
            torch.stack([sin for _, sin in tables]),
        )
        self._graph: Any = None

    def serves(self, batch: int, slots: int, sampling: Sampling) -> bool:
        """Return whether this cache serves a call for so many slots without wasting most of it."""
        same = (self.batch, self.sampling) == (batch, sampling)
        return same and slots <= self.capacity <= 4 * slots

    def prefill(self, prompts: Sequence[Sequence[int]], seed: int) -> None:
        """Fill the cache with prompts and choose each row's first token, into ``token``."""
        with torch.no_grad(), attention.current_device(self.executor.device):
            self._random.manual_seed(seed)
            self._prefill(prompts)

    def step(self) -> None:
        """Put ``token`` into the cache and choose the next one, without waiting for a GPU."""
        with torch.no_grad(), attention.current_device(self.executor.device):
            self._draw()
            if self._capturable and self._graph is None:
                self._graph = self._captured()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step()
        self._length += 1

    def release(self) -> None:
        """Free the CUDA graph, even while something still refers to this decoder."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        executor, spec = self.executor, self.executor.spec
        length = max(len(prompt) for prompt in prompts)
        pads = [length - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)])
        self._pads.copy_(torch.tensor(pads))
        self._slot.zero_()
        self._length = length
        position = (torch.arange(length, device=executor.device) - self._pads[:, None]).clamp(min=0)
        long = (length - self._pads > spec.rope.original).long()[:, None]
        if not any(pads):
            position, long = position[:1], long[:1]
        cos, sin = (table[long, position][:, None] for table in self._tables)

        def attend(layer: int, rank: int) -> Attend:
            return attention.prompt_attention(spec, layer, rank, length, pads, executor.device)

        if self._fused:
            slot, rotary = self._slot, (cos, sin)
            logits = self._fused_forward(
                ids,
                lambda layer, rank: _of_prompt(spec, rotary, slot, attend(layer, rank), length),
            )
        else:
            logits = self._plain_forward(
                ids, (cos, sin), lambda layer, rank, cache: _filling(cache, attend(layer, rank))
            )
        self._slot.fill_(length)
        self._draw()
        self._choose(logits)

    def _step(self) -> None:
        ids = self.token.clamp(min=0)[:, None]  # NO_TOKEN is no row of the embedding
        if self._fused:
            logits = self._fused_forward(ids, self._attending)
        else:
            position = self._slot - self._pads
            long = (position + 1 > self.executor.spec.rope.original).long()
            cos, sin = (table[long, position][:, None, None] for table in self._tables)
            logits = self._plain_forward(ids, (cos, sin), self._extending)
        self._choose(logits)
        self._slot += 1

    def _choose(self, logits: Tensor) -> None:
        if self._fused and self.sampling.greedy:
            from phireg.executor.cuda import launch

            launch.choose(logits, self.token)
        else:
            self.token.copy_(choose(logits, self.sampling, self._noise))

    def _captured(self) -> Any:
        from phireg.executor.cuda.fused import capture

        token, slot = self.token.clone(), self._slot.clone()

        def restore() -> None:
            self.token.copy_(token)
            self._slot.copy_(slot)

        return capture(self._step, restore)

    def _draw(self) -> None:
        if not self.sampling.greedy:
            self._noise.exponential_(generator=self._random)

    def _plain_forward(
        self, ids: Tensor, rotary: Rotary, attend: Callable[[int, int, Cache], Attend]
    ) -> Tensor:
        executor = self.executor
        ends = executor.end_weights()
        x = executor.embed(ends, ids)
        for layer, caches in enumerate(self._caches):
            pairs = zip(executor.ranks, caches, strict=True)
            attends = [attend(layer, rank, cache) for rank, cache in pairs]
            x = executor.run_layer(executor.layer_weights(layer), x, rotary, attends)
        return executor.logits(ends, x[:, -1])

    def _fused_forward(self, ids: Tensor, attend: Callable[[int, int], AttendCache]) -> Tensor:
        from phireg.executor.cuda import fused

        executor = self.executor
        layers = range(executor.spec.num_layers)
        attends = [[attend(layer, rank) for rank in executor.ranks] for layer in layers]
        return fused.forward(executor, ids, self._caches, attends)

    def _attending(self, layer: int, rank: int) -> AttendCache:
        """Return the kernel's attention of a new token over a cache that has it."""
        from phireg.executor.cuda import launch

        spec = self.executor.spec
        pattern = spec.sparse if spec.is_sparse(layer) else None
        place = (self._tables, self._slot, self._pads)
        return partial(launch.attend_step, spec, *place, pattern, rank * spec.rank_heads)

    def _extending(self, layer: int, rank: int, cache: Cache) -> Attend:
        """Return the attention of a new token, stored in the next slot, over the slots up to it."""
        spec, slot = self.executor.spec, self._length
        mask = attention.slot_mask(spec, spec.is_sparse(layer), rank, self._pads)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            end = slot + 1
            for kept, new in zip(cache, (key, value), strict=True):
                kept[:, :, slot:end] = new
            keys, values = (kept[:, :, :end] for kept in cache)
            return blocks.masked_attention(query, keys, values, spec.attention_scale, mask)

        return attend


def _filling(cache: Cache, inner: Attend) -> Attend:
    """Return ``inner``, also storing the prompt's keys and values in the first slots."""

    def attend_prompt(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for kept, new in zip(cache, (key, value), strict=True):
            kept[:, :, : new.shape[2]] = new
        return inner(query, key, value)

    return attend_prompt


def _of_prompt(
    spec: ModelSpec, rotary: Rotary, slot: Tensor, inner: Attend, length: int
) -> AttendCache:
    """Return ``inner`` over the first slots, which hold the prompt's keys and values."""

    def attend_prompt(qkv: Tensor, cache: Cache, kv_scale: Tensor | None, rounding: Any) -> Tensor:
        from phireg.executor.cuda import launch

        query, keys, values = launch.rotate_into(spec, qkv, rotary, cache, slot, kv_scale)
        output = inner(query, keys[:, :, :length], values[:, :, :length])
        output = output.transpose(1, 2).flatten(2).contiguous()
        return output if rounding is None else launch.quantize(output, rounding, levels=True)

    return attend_prompt
