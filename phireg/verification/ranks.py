"""Compare the ranks in lockstep with the same ranks merged into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phireg.executor import Executor, ModelSpec
from phireg.executor.sources import Source
from phireg.executor.stored import stored_in_rank
from phireg.reader.schemes import LINEARS, ROW_LINEARS, SCHEMES, Quantization
from phireg.reader.storage import Storage
from phireg.reader.tensors import is_scale, replicated
from phireg.verification.logits import check_reference, logits_tolerance, overall, token_errors
from phireg.verification.prompts import prompt_ids
from phireg.verification.result import Place

_OF_EXPERTS = tuple(
    f"{module}.{part}"
    for module in ("mlp.fc", "mlp.proj")
    for part in ("weight", "weights_scaling_factor")
)
_BY_COLUMNS = tuple(
    f"{module}.{part}" for module in ROW_LINEARS for part in ("weight", "prequant_scaling_factor")
)


def compare_ranks(
    executor: Executor, sources: Sequence[Source], tokens: int, progress: Callable[[int], None]
) -> tuple[float, float, Place | None]:
    """Return the relative error of the logits, its tolerance, and the first wrong sub-module."""
    spec = executor.spec
    ids = prompt_ids(spec.vocab_size, tokens).to(executor.device)
    outputs: dict[tuple[int, str], Tensor] = {}
    tolerance = logits_tolerance(executor.dtype, spec.num_layers)
    wrong: list[Place] = []

    def keep(layer: int, what: str, x: Tensor) -> None:
        part = "mlp" if what == "hidden" else what
        check_reference((None if layer < 0 else layer, part), x)
        if what == "hidden":
            progress(1)
        else:
            outputs[layer, what] = x.cpu()

    def compare(layer: int, what: str, x: Tensor) -> None:
        if what == "hidden":
            progress(1)
        elif what in ("attention", "mlp"):
            error = float(token_errors(x.cpu(), outputs[layer, what]).max())
            if not error <= tolerance:
                wrong.append((layer, what))

    expected = merged_executor(executor, sources)(ids, keep)[0]
    actual = executor(ids, compare)[0]
    error = overall(token_errors(actual, expected))
    return error, tolerance, wrong[0] if wrong else None


def merged_executor(executor: Executor, sources: Sequence[Source]) -> Executor:
    """Return the same checkpoint at TP 1; tensors are merged when a layer asks for them."""
    experts = executor.spec.experts
    whole = dataclasses.replace(
        executor.spec, tp_size=1, experts=experts and dataclasses.replace(experts, ep_size=1)
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
    """Merge a tensor of all ranks, by what the reader takes their rows for."""
    if replicated(spec, name):
        return shards[0]
    if spec.experts is not None and name.endswith(_OF_EXPERTS):
        return _merge_experts(name, shards, spec.experts.ep_size)
    if name.startswith("lm_head"):
        return torch.cat(shards)[: spec.vocab_size]
    if name.endswith(_BY_COLUMNS):
        return torch.cat(shards, dim=-1)
    if "attention.qkv" in name:
        own, kv = (heads * spec.head_size for heads in (spec.rank_heads, spec.rank_kv_heads))
        parts = [shard.split([own, kv, kv]) for shard in shards]
        copies = max(1, spec.tp_size // spec.num_kv_heads)
        return torch.cat([p[0] for p in parts] + [p[n] for n in (1, 2) for p in parts[::copies]])
    return _merge_halves(shards) if spec.activation == "swiglu" else torch.cat(shards)


def _merge_halves(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    halves = [shard.chunk(2, dim) for shard in shards]
    return torch.cat([half[n] for n in (0, 1) for half in halves], dim)


def _merge_experts(name: str, shards: list[Tensor], ep_size: int) -> Tensor:
    """Merge stacked linears: rank r has share r mod ``ep_size`` of the experts."""
    shares = [shards[share::ep_size] for share in range(ep_size)]
    if is_scale(name):
        return torch.cat([share[0] for share in shares])
    if name.endswith("mlp.proj.weight"):
        return torch.cat([torch.cat(share, dim=2) for share in shares])
    return torch.cat([_merge_halves(share, dim=1) for share in shares])


def dequantized(spec: ModelSpec, sources: Sequence[Source]) -> tuple[ModelSpec, list[Source]]:
    """Return the same model with nothing quantized, neither inputs nor the KV cache."""
    plain = dataclasses.replace(spec, quantization=Quantization())
    scheme = SCHEMES.get(spec.quantization.weights or "")
    if scheme is None or scheme.storage is None:
        return plain, list(sources)
    return plain, [_dequantized(source, scheme.storage) for source in sources]


def _dequantized(source: Source, storage: Storage) -> Source:
    def read(name: str) -> Tensor:
        linear, _, part = name.rpartition(".")
        if part != "weight" or not linear.endswith(LINEARS):
            return source(name)
        stored = stored_in_rank(storage, linear, source)
        return stored.values * (1 if stored.smoothing is None else stored.smoothing.float())

    return read
