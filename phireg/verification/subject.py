"""The model that a server should serve: right, and with each fault that servers are known for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phireg.executor import Executor, ModelSpec, read_meaning
from phireg.executor.directories import DirectorySource
from phireg.executor.model import open_sources
from phireg.executor.sources import Source
from phireg.files.json import read_json_object
from phireg.generation.tokenizer import Tokenizer, find_tokenizer, stop_ids
from phireg.planning.plan import plan_config
from phireg.reader.spec import parse_spec
from phireg.reader.tensors import KV_SCALE
from phireg.reference.load import open_reference

FAULTS = {
    "long": "long rope takes the long factors for every request (one server does so by a setting, "
    "when the longest request it allows is past the switch)",
    "short": "long rope takes the short factors for every request",
    "dense": "block-sparse layers attend to all tokens",
    "window": "the sliding window is ignored",
    "cache": "the scales of the quantized KV cache are dropped",
}
"""What servers get wrong, by name."""

Logits = Callable[[Sequence[int]], Tensor]
"""Takes token ids; returns float32 logits of each, [tokens, vocab_size], on the CPU."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that a server should serve; ``logits`` takes the name of a fault, or None."""

    logits: Callable[[str | None], Logits]
    spec: ModelSpec
    sliding: int | None  # tokens of a sliding window
    tokenizer: Tokenizer | None
    stops: frozenset[int]

    @property
    def original(self) -> int | None:
        """Tokens up to which long rope has the short factors."""
        return None if self.spec.rope.short is None else self.spec.rope.original


def open_checkpoint(directory: Path, device: torch.device) -> Subject:
    """Open a checkpoint or a quantized directory, to be computed by the executor."""
    spec = read_meaning(directory)
    sources = open_sources(directory, spec, range(spec.tp_size))

    def logits(fault: str | None) -> Logits:
        changed = _changed_spec(spec, fault)
        read = [_without_scale(source) for source in sources] if fault == "cache" else sources
        executor = Executor(changed, read, range(spec.tp_size), device=device)
        return lambda ids: executor(torch.tensor([list(ids)], device=device))[0].cpu()

    tokenizer = find_tokenizer(directory)
    return Subject(logits, spec, spec.sliding_window, tokenizer, stop_ids(directory, tokenizer))


def open_source(directory: Path, device: torch.device) -> Subject:
    """Open a source model, to be computed by its own class in its own dtype."""
    values = read_json_object(directory / "config.json")
    plan = plan_config(directory)
    spec = parse_spec(plan.config)
    own = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    dtype = getattr(torch, own) if own in ("float16", "bfloat16") else torch.float32
    window = values.get("sliding_window")

    def logits(fault: str | None) -> Logits:
        reference = open_reference(
            plan.chosen.family,
            directory,
            weights=None,
            dtype=dtype,
            device=device,
            change=lambda config: _change_config(config, fault, window),
        )
        reference.keep_all()
        return lambda ids: reference.logits(torch.tensor([list(ids)], device=device))[0].cpu()

    tokenizer = find_tokenizer(directory)
    binds = isinstance(window, int) and window < spec.max_position_embeddings
    return Subject(
        logits, spec, window if binds else None, tokenizer, stop_ids(directory, tokenizer)
    )


def _changed_spec(spec: ModelSpec, fault: str | None) -> ModelSpec:
    rope = spec.rope
    if fault == "long":
        rope = dataclasses.replace(rope, short=rope.long, short_mscale=rope.long_mscale)
    elif fault == "short":
        rope = dataclasses.replace(rope, long=rope.short, long_mscale=rope.short_mscale)
    sparse = None if fault == "dense" else spec.sparse
    window = None if fault == "window" else spec.sliding_window
    return dataclasses.replace(spec, rope=rope, sparse=sparse, sliding_window=window)


class _WithoutScales(DirectorySource):
    def cache_scales(self, index: int) -> dict[str, Tensor]:
        scales = super().cache_scales(index)
        return {name: torch.ones_like(scale) for name, scale in scales.items()}


def _without_scale(source: Source) -> Source:
    if isinstance(source, DirectorySource):
        return _WithoutScales(source.directory, source.shards)

    def read(name: str) -> Tensor:
        tensor = source(name)
        return torch.ones_like(tensor) if name.endswith(KV_SCALE) else tensor

    return read


def _change_config(values: dict[str, Any], fault: str | None, window: object) -> None:
    """Plant a fault in the values of a config.json, in place."""
    if window is not None and fault != "window":
        values["sliding_window"] = window
    for key in ("rope_parameters", "rope_scaling"):
        block = values.get(key)
        if isinstance(block, Mapping) and "long_factor" in block and fault in ("long", "short"):
            other = "short" if fault == "long" else "long"
            values[key] = dict(block) | {
                f"{other}_{what}": block[f"{fault}_{what}"]
                for what in ("factor", "mscale")
                if f"{fault}_{what}" in block
            }
    if fault == "dense":
        values["dense_attention_every_n_layers"] = 1
