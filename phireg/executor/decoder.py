"""A batch's static key/value cache, and the two ways tokens enter it: a prompt, then steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phireg.executor import attend, blocks, captured
from phireg.executor.blocks import Attend, Rotary, Weights
from phireg.executor.captured import Cache, Sight
from phireg.executor.model import Executor
from phireg.executor.sampling import Sampling, choose


class Decoder:
    """Generates for one batch at a time; a later batch of the same shape can follow.

    A quantized cache is one in effect: it holds, in the compute dtype, the values that come back
    from the layer's grid.

    With long rope, each call takes the short or the long factors by the tokens so far (a prompt:
    its length; a step: the tokens in the cache and its own). Keys already in the cache stay as
    they were rotated when that changes, as in TensorRT-LLM.

    Args:
        executor: the model.
        batch: rows.
        capacity: slots of the cache: prompt and new tokens together, padding included. On a GPU
            a multiple of ``captured.TILE``.
        sampling: how tokens are chosen; the seed is given with each prompt.
        fused: steps are compiled, and captured in a CUDA graph, rather than run one operation at
            a time.
    """

    def __init__(
        self, executor: Executor, batch: int, capacity: int, sampling: Sampling, *, fused: bool
    ) -> None:
        blueprint, device = executor.blueprint, executor.device
        self.executor = executor
        self.batch = batch
        self.capacity = capacity
        self.sampling = sampling
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._fused = fused
        self._length = 0
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._pads = torch.zeros(batch, dtype=torch.int64, device=device)
        self._random = torch.Generator(device)
        columns = 0 if sampling.greedy else blueprint.vocab_size
        self._noise = torch.ones(batch, columns, dtype=torch.float32, device=device)
        shape = (batch, blueprint.rank_kv_heads, capacity, blueprint.head_size)
        self._caches: list[list[Cache]] = [
            [
                (
                    torch.zeros(shape, dtype=executor.dtype, device=device),
                    torch.zeros(shape, dtype=executor.dtype, device=device),
                )
                for _ in executor.ranks
            ]
            for _ in range(blueprint.num_layers)
        ]
        tables = [
            blocks.rotary_tables(blueprint.rope, capacity, long, device) for long in (False, True)
        ]
        self._tables: Rotary = (
            torch.stack([cos for cos, _ in tables]),
            torch.stack([sin for _, sin in tables]),
        )
        self._replay: Callable[[], None] | None = None

    def serves(self, batch: int, need: int, sampling: Sampling) -> bool:
        """Whether a call for ``need`` slots can follow in this cache without wasting most of it."""
        same = (self.batch, self.sampling) == (batch, sampling)
        return same and need <= self.capacity <= 4 * need

    def prefill(self, prompts: Sequence[Sequence[int]], seed: int) -> None:
        """Fill the cache with prompts and choose each row's first token, into ``token``."""
        with torch.no_grad():
            self._random.manual_seed(seed)
            self._prefill(prompts)

    def step(self) -> None:
        """Put ``token`` into the cache and choose the next one, without waiting for a GPU."""
        with torch.no_grad():
            self._draw()
            if self._replay is not None:
                self._replay()
            elif self._fused and self.token.is_cuda:
                self._replay = self._captured()
                self._replay()
            elif self._fused:
                self._fused_step()
            else:
                self._plain_step()
        self._length += 1

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        executor, blueprint = self.executor, self.executor.blueprint
        length = max(len(prompt) for prompt in prompts)
        pads = [length - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)])
        self._pads.copy_(torch.tensor(pads))
        self._slot.fill_(length)
        self._length = length

        position = (torch.arange(length, device=executor.device) - self._pads[:, None]).clamp(min=0)
        if not any(pads):
            position = position[:1]
        long = int(length > blueprint.rope.original)
        cos, sin = (table[long][position][:, None] for table in self._tables)
        ends = executor.end_weights()
        x = executor.embed(ends, ids)
        for layer in range(blueprint.num_layers):
            attends = [
                _filling(
                    cache,
                    attend.prompt_attention(blueprint, layer, rank, length, pads, executor.device),
                )
                for rank, cache in zip(executor.ranks, self._caches[layer], strict=True)
            ]
            x = executor.run_layer(executor.layer_weights(layer), x, (cos, sin), attends)
        self._draw()
        self.token.copy_(choose(executor.logits(ends, x[:, -1]), self.sampling, self._noise))

    def _captured(self) -> Callable[[], None]:
        token, slot = self.token.clone(), self._slot.clone()

        def restore() -> None:
            self.token.copy_(token)
            self._slot.copy_(slot)

        return captured.capture(self._fused_step, restore)

    def _draw(self) -> None:
        if not self.sampling.greedy:
            self._noise.exponential_(generator=self._random)

    def _plain_step(self) -> None:
        executor, blueprint = self.executor, self.executor.blueprint
        rotary = captured.step_rotary(blueprint.rope, self._tables, self._slot, self._pads)
        masks = {
            (sparse, rank): attend.slot_mask(blueprint, sparse, rank, self._pads)
            for sparse in (False, True)
            for rank in executor.ranks
        }
        ends = executor.end_weights()
        x = executor.embed(ends, self.token[:, None])
        for layer in range(blueprint.num_layers):
            attends = [
                _extending(
                    cache,
                    self._length,
                    masks[blueprint.is_sparse(layer), rank],
                    blueprint.attention_scale,
                )
                for rank, cache in zip(executor.ranks, self._caches[layer], strict=True)
            ]
            x = executor.run_layer(executor.layer_weights(layer), x, rotary, attends)
        self.token.copy_(choose(executor.logits(ends, x[:, -1]), self.sampling, self._noise))
        self._slot += 1

    def _fused_step(self) -> None:
        executor, blueprint = self.executor, self.executor.blueprint
        ends = executor.end_weights()
        x, rotary, sights = captured.compiled(_begin)(
            executor, ends, self.token, self._tables, self._slot, self._pads, self.capacity
        )
        run_layer = captured.compiled(captured.step_layer)
        for layer in range(blueprint.num_layers):
            x = run_layer(
                blueprint,
                executor.layer_weights(layer),
                x,
                rotary,
                self._caches[layer],
                sights[blueprint.is_sparse(layer)],
                self._slot,
                executor.reduce,
            )
        captured.compiled(_end)(executor, ends, x, self.sampling, self._noise, self.token)
        self._slot += 1


def _begin(
    executor: Executor,
    ends: list[Weights],
    token: Tensor,
    tables: Rotary,
    slot: Tensor,
    pads: Tensor,
    capacity: int,
) -> tuple[Tensor, Rotary, dict[bool, list[Sight]]]:
    """What the layers of a step share: hidden states, rotary, what each rank's heads see."""
    blueprint = executor.blueprint
    kinds = [False] if blueprint.sparse is None else [False, True]
    sights = {
        sparse: [
            captured.sight(blueprint, sparse, rank, slot, pads, capacity) for rank in executor.ranks
        ]
        for sparse in kinds
    }
    x = executor.embed(ends, token[:, None])
    return x, captured.step_rotary(blueprint.rope, tables, slot, pads), sights


def _end(
    executor: Executor,
    ends: list[Weights],
    x: Tensor,
    sampling: Sampling,
    noise: Tensor,
    token: Tensor,
) -> None:
    token.copy_(choose(executor.logits(ends, x[:, -1]), sampling, noise))


def _filling(cache: Cache, inner: Attend) -> Attend:
    """``inner``, which also leaves the prompt's keys and values in the first slots."""

    def attend_prompt(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for kept, new in zip(cache, (key, value), strict=True):
            kept[:, :, : new.shape[2]] = new
        return inner(query, key, value)

    return attend_prompt


def _extending(cache: Cache, slot: int, mask: attend.Mask, scale: float) -> Attend:
    """Attention of the token in ``slot`` over the slots up to it."""

    def attend_cache(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = cache
        keys[:, :, slot : slot + 1] = key
        values[:, :, slot : slot + 1] = value
        end = slot + 1
        return blocks.masked_attention(query, keys[:, :, :end], values[:, :, :end], scale, mask)

    return attend_cache
