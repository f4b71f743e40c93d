"""The rank files put together again as one rank, by what the reader takes their rows for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from phireg.executor import Executor, ModelSpec
from phireg.executor.model import Source
from phireg.reader.schemes import ROW_LINEARS
from phireg.reader.tensors import replicated

_BY_COLUMNS = tuple(
    f"{module}.{part}" for module in ROW_LINEARS for part in ("weight", "prequant_scaling_factor")
)


def merged_executor(executor: Executor, sources: Sequence[Source]) -> Executor:
    """The same checkpoint at TP 1; tensors are merged when a layer asks for them.

    Args:
        executor: all ranks in lockstep.
        sources: its ranks' tensors by name.
    """
    experts = executor.spec.experts
    whole = dataclasses.replace(
        executor.spec,
        tp_size=1,
        experts=experts and dataclasses.replace(experts, ep_size=1),
    )
    return Executor(
        whole,
        [lambda name: merge(executor.spec, name, [source(name) for source in sources])],
        range(1),
        device=executor.device,
        dtype=executor.dtype,
        offload=True,
    )


def merge(spec: ModelSpec, name: str, shards: list[Tensor]) -> Tensor:
    """One tensor of all ranks."""
    if replicated(name, spec.quantization.weights):
        return shards[0]
    if spec.experts is not None and name.endswith(("mlp.fc.weight", "mlp.proj.weight")):
        return _experts(name, shards, spec.experts.ep_size)
    if name.startswith("lm_head"):
        return torch.cat(shards)[: spec.vocab_size]
    if name.endswith(_BY_COLUMNS):
        return torch.cat(shards, dim=-1)
    if "attention.qkv" in name:
        own, kv = (n * spec.head_size for n in (spec.rank_heads, spec.rank_kv_heads))
        parts = [shard.split([own, kv, kv]) for shard in shards]
        copies = max(1, spec.tp_size // spec.num_kv_heads)
        return torch.cat([p[0] for p in parts] + [p[n] for n in (1, 2) for p in parts[::copies]])
    if spec.activation == "swiglu":
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[n] for n in (0, 1) for half in halves])
    return torch.cat(shards)


def _experts(name: str, shards: list[Tensor], ep_size: int) -> Tensor:
    """Stacked linears: rank r has share r mod ``ep_size`` of the experts, cut with its equals."""
    whole = []
    for share in range(ep_size):
        own = shards[share::ep_size]
        if name.endswith("mlp.proj.weight"):
            whole.append(torch.cat(own, dim=2))
        else:
            halves = [shard.chunk(2, dim=1) for shard in own]
            whole.append(torch.cat([half[n] for n in (0, 1) for half in halves], dim=1))
    return torch.cat(whole)
