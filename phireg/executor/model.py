"""A checkpoint as a module of torch, its ranks in lockstep in one process or in one each."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from phireg.checkpoint.shards import read_directory
from phireg.errors import UsageError
from phireg.executor import blocks, quantized
from phireg.executor.attention import current_device, prompt_attention
from phireg.executor.blocks import Attend, Rotary, Weights
from phireg.executor.directories import DirectorySource, open_directory
from phireg.executor.levels import packed_bytes
from phireg.executor.sources import Source, open_ranks
from phireg.executor.stored import rank_layer
from phireg.files.kinds import HF_MODEL, kind_of
from phireg.formats import FORMATS
from phireg.reader.schemes import ROW_LINEARS, Quantization
from phireg.reader.spec import ModelSpec, read_spec
from phireg.reader.tensors import EMBEDDING, end_tensors, layer_prefix, layer_tensors, rank_tensors

# (layer, what, value): what is "embedding" (layer -1), "attention", "mlp" or "hidden".
Observe = Callable[[int, str, Tensor], None]
# (layer, linear, input): linear is "attention.qkv", "attention.dense", "mlp.fc" or "mlp.proj".
ObserveInputs = Callable[[int, str, Tensor], None]

# Layers are kept in memory while they take no more than this part of what is free.
_MEMORY_SHARE = 0.8


def load(
    checkpoint_dir: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    offload: bool | None = None,
    distributed: bool = False,
) -> Executor:
    """Open a checkpoint of the Phi family for running.

    Args:
        checkpoint_dir: a TensorRT-LLM checkpoint, config.json and one rank{r}.safetensors per rank;
            or a Hugging Face directory, quantized by ModelOpt or compressed-tensors, or not at all.
        device: where to compute.
        dtype: compute dtype (float32, float16 or bfloat16); None is the checkpoint's own. Norms,
            rotary embedding and softmax are computed in float32 whatever it is. Quantized weights
            are kept dequantized in it, and on a GPU as they are stored.
        offload: True reads every layer from the mapped file when it is needed and keeps none of
            them; None does so only when the weights do not fit into free memory.
        distributed: torch.distributed is initialized with one process per rank: this process
            opens its own rank file only. Otherwise all ranks run here, in lockstep. Call the
            model's ``release`` before torch.distributed ends.

    Raises:
        CheckError: the directory is not a checkpoint the executor can run.
        UsageError: the number of processes is not the checkpoint's number of ranks.
    """
    directory = Path(checkpoint_dir)
    spec = read_meaning(directory)
    ranks = range(spec.tp_size)
    if distributed:
        if dist.get_world_size() != spec.tp_size:
            raise UsageError(
                f"{directory} has {spec.tp_size} rank(s) and {dist.get_world_size()} "
                "process(es) were started",
                hint=f"start it with torchrun --nproc-per-node {spec.tp_size}",
            )
        ranks = range(dist.get_rank(), dist.get_rank() + 1)
    sources = open_sources(directory, spec, ranks)
    return Executor(spec, sources, ranks, device=device, dtype=dtype, offload=offload)


def is_directory(path: Path) -> bool:
    """Return whether a directory is a Hugging Face one, and no checkpoint of TensorRT-LLM."""
    return kind_of(path) is HF_MODEL


def read_meaning(path: Path) -> ModelSpec:
    """Return the meaning of a checkpoint, or of a Hugging Face directory; see ``load``."""
    return read_directory(path).spec if is_directory(path) else read_spec(path)


def open_sources(path: Path, spec: ModelSpec, ranks: Sequence[int]) -> list[Source]:
    """Open the tensors of a checkpoint's ranks, or of a Hugging Face directory, which is one."""
    if is_directory(path):
        return [open_directory(path, read_directory(path))]
    return open_ranks(path, spec, ranks)


class Executor(torch.nn.Module):  # type: ignore[misc]
    """A checkpoint ready to run; ``load`` makes one from files.

    Args:
        spec: the meaning of the tensors.
        sources: for each rank of this process, a function from a tensor's name to the tensor.
        ranks: the numbers of those ranks: all of them, or one when each rank has its own process.
        device: where to compute.
        dtype: compute dtype, or None for the checkpoint's.
        offload: see ``load``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        sources: Sequence[Source],
        ranks: Sequence[int],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        offload: bool | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.ranks = tuple(ranks)
        self.device = torch.device(device)
        name = dtype or spec.dtype
        self.dtype: torch.dtype = getattr(torch, name) if isinstance(name, str) else name
        self._sources = tuple(sources)
        self.offload = self._exceeds_memory() if offload is None else offload
        self.decoder: Any = None  # the last generation's cache, for the next one of its shape
        self._layers: list[list[Weights]] = []
        self._ends: list[Weights] = []
        if not self.offload:
            self._layers = [self._read_layer(index) for index in range(spec.num_layers)]
            self._ends = self._read_ends()

    @property
    def _is_directory(self) -> bool:
        return isinstance(self._sources[0], DirectorySource)

    @property
    def _sized(self) -> ModelSpec:
        """The spec whose tensors tell the memory: a directory's weights become values."""
        if not self._is_directory:
            return self.spec
        return dataclasses.replace(self.spec, quantization=Quantization())

    @property
    def distributed(self) -> bool:
        """The other ranks run in other processes."""
        return len(self.ranks) < self.spec.tp_size

    @property
    def fusable(self) -> bool:
        """Whether the kernels of ``cuda.fused`` compute all of it."""
        spec = self.spec
        if not self._is_directory:
            return True
        return (
            spec.experts is None and spec.sliding_window is None and not spec.quantization.kv_cache
        )

    def release(self) -> None:
        """Give up the last generation's cache and captured step.

        With one process per rank this must come before torch.distributed ends: NCCL waits, without
        end, for graphs that hold its operations.
        """
        if self.decoder is not None:
            self.decoder.release()
            self.decoder = None

    def layer_weights(self, index: int) -> list[Weights]:
        """Return the tensors of layer ``index``, for each rank of this process."""
        self._check_files()
        return self._layers[index] if self._layers else self._read_layer(index)

    def end_weights(self) -> list[Weights]:
        """Return embedding, final norm and lm_head by full names, for each rank here."""
        self._check_files()
        return self._ends or self._read_ends()

    def forward(
        self,
        input_ids: Tensor,
        observe: Observe | None = None,
        observe_inputs: ObserveInputs | None = None,
    ) -> Tensor:
        """Return logits of every position, float32 [batch, sequence, vocab_size], without a cache.

        Args:
            input_ids: int64 [batch, sequence], no padding.
            observe: called with (layer, what, value) as the computation goes: (-1, "embedding",
                ...), then for every layer "attention" and "mlp", the sub-modules' outputs with
                their biases and summed over ranks, and "hidden", the layer's output. Values are
                [batch, sequence, hidden_size] in the compute dtype.
            observe_inputs: called with (layer, linear, value) for every linear of every layer:
                what goes into it, before smoothing and quantization, [batch, sequence,
                in_features] of all ranks together, in the compute dtype.
        """
        with torch.no_grad(), current_device(self.device):
            length = input_ids.shape[1]
            ends = self.end_weights()
            x = self.embed(ends, input_ids)
            if observe is not None:
                observe(-1, "embedding", x)
            rope = self.spec.rope
            rotary = blocks.rotary_tables(rope, length, length > rope.original, self.device)
            for index in range(self.spec.num_layers):
                attends = [
                    prompt_attention(self.spec, index, rank, length, (), self.device)
                    for rank in self.ranks
                ]
                outputs = None if observe is None else partial(observe, index)
                inputs = None if observe_inputs is None else self._inputs(observe_inputs, index)
                x = self.run_layer(self.layer_weights(index), x, rotary, attends, outputs, inputs)
            return self.logits(ends, x)

    def embed(self, ends: list[Weights], ids: Tensor) -> Tensor:
        """Turn token ids of any shape into hidden states in the compute dtype."""
        table = ends[0][EMBEDDING]
        x = functional.embedding(ids.to(table.device), table).to(self.device, self.dtype)
        multiplier = self.spec.embedding_multiplier
        return x if multiplier == 1.0 else x * multiplier

    def run_layer(
        self,
        shards: list[Weights],
        x: Tensor,
        rotary: Rotary,
        attends: list[Attend],
        observe: Callable[[str, Tensor], None] | None = None,
        observe_inputs: Callable[[str, list[Tensor]], None] | None = None,
    ) -> Tensor:
        """Run one decoder layer over the ranks in this process, in lockstep; ``x`` is [B, T, h].

        ``observe`` is called with "attention", "mlp" (their outputs, biases included) and "hidden";
        ``observe_inputs`` with a linear's name and its input, before smoothing and quantization:
        one tensor of a column linear, each rank's of a row linear, expert by expert.
        """
        spec, first = self.spec, shards[0]
        u = blocks.norm(spec, first, "input_layernorm", x)
        heads = [
            blocks.attention(spec, weights, u, rotary, attend)
            for weights, attend in zip(shards, attends, strict=True)
        ]
        if observe_inputs is not None:
            observe_inputs("attention.qkv", [u])
            observe_inputs("attention.dense", heads)
        attended = blocks.row_linear(shards, "attention.dense", heads, self.reduce)
        if spec.architecture.residual == "sequential":
            x = x + attended
            u = blocks.norm(spec, first, "post_layernorm", x)
        if spec.experts is None:
            gated = [blocks.activate(spec, blocks.linear(w, "mlp.fc", u)) for w in shards]
            if observe_inputs is not None:
                observe_inputs("mlp.fc", [u])
                observe_inputs("mlp.proj", gated)
            mlp = blocks.row_linear(shards, "mlp.proj", gated, self.reduce)
        else:
            parts: dict[int, list[Tensor]] = defaultdict(list)  # of each expert's input of proj
            mlp = blocks.mixture(
                *(spec, shards, self.ranks, u, self.reduce),
                None if observe_inputs is None else lambda e, part: parts[e].append(part),
            )
            if observe_inputs is not None:
                observe_inputs("mlp.fc", [u])
                for gated in parts.values():
                    observe_inputs("mlp.proj", gated)
        x = x + mlp if spec.architecture.residual == "sequential" else x + attended + mlp
        if observe is not None:
            observe("attention", attended)
            observe("mlp", mlp)
            observe("hidden", x)
        return x

    def logits(self, ends: list[Weights], x: Tensor) -> Tensor:
        """Apply final norm and lm_head: float32 [..., vocab_size] without the padding."""
        u = blocks.norm(self.spec, ends[0], "transformer.ln_f", x)
        return self.whole_logits([blocks.linear(weights, "lm_head", u) for weights in ends])

    def whole_logits(self, parts: list[Tensor]) -> Tensor:
        """Join the ranks' lm_head outputs to logits, as ``logits``."""
        whole = self.gather(parts)[..., : self.spec.vocab_size].float()
        divisor = self.spec.logits_divisor
        return whole if divisor == 1.0 else whole / divisor

    def reduce(self, partial: list[Tensor]) -> Tensor:
        """Sum the ranks' partial outputs, in rank order."""
        total = partial[0]
        for part in partial[1:]:
            total = total + part
        if self.distributed:
            dist.all_reduce(total)
        return total

    def gather(self, parts: list[Tensor]) -> Tensor:
        """Join all ranks' parts in the last dimension, in rank order."""
        if self.distributed:
            own = parts[0].contiguous()
            parts = [torch.empty_like(own) for _ in range(self.spec.tp_size)]
            dist.all_gather(parts, own)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _check_files(self) -> None:
        """Refuse mapped files that became shorter, where tensors may still lie in them."""
        if self._ends and self.device.type == "cpu":
            for source in self._sources:
                source(EMBEDDING)

    def _inputs(
        self, observe_inputs: ObserveInputs, layer: int
    ) -> Callable[[str, list[Tensor]], None]:
        def whole(linear: str, parts: list[Tensor]) -> None:
            value = self.gather(parts) if linear in ROW_LINEARS else parts[0]
            observe_inputs(layer, linear, value)

        return whole

    def _read_layer(self, index: int) -> list[Weights]:
        (first, *_) = self._sources
        if isinstance(first, DirectorySource):
            return [first.layer(index, self.device, self.dtype)]
        names, prefix = layer_tensors(self.spec, index), layer_prefix(index)
        shards = [{name: source(prefix + name) for name in names} for source in self._sources]
        return [rank_layer(self.spec, shard, self.device, self.dtype) for shard in shards]

    def _read_ends(self) -> list[Weights]:
        def read(source: Source, name: str) -> Tensor:
            # An embedding that is only looked up may stay in the mapped file.
            if self.offload and name == EMBEDDING:
                return source(name)
            return source(name).to(self.device, self.dtype)

        (first, *_) = self._sources
        if isinstance(first, DirectorySource):
            return [first.ends(self.device, self.dtype, self.offload)]
        names = end_tensors(self.spec)
        return [{name: read(source, name) for name in names} for source in self._sources]

    def _exceeds_memory(self) -> bool:
        on_gpu, stored_dtype = self.device.type == "cuda", getattr(torch, self.spec.dtype)
        if not on_gpu and self.spec.quantization.weights is None and stored_dtype == self.dtype:
            return False  # used where it is mapped; the system reads and drops pages itself
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else free_memory()
        needed = 0
        for name, (_, shape) in rank_tensors(self._sized).items():
            module, _, part = name.rpartition(".")
            scheme = self._sized.quantization.scheme(module) if part == "weight" else None
            form = None if scheme is None else FORMATS[scheme.qformat]
            if (
                form is not None
                and not form.rounds_products
                and quantized.keeps_levels(self.device, form.weight)
            ):
                size = packed_bytes(form.weight, shape)
            else:
                size = math.prod(shape) * self.dtype.itemsize
            in_pairs = scheme is not None and scheme.grouped
            needed += size * len(self.ranks) * (2 if in_pairs else 1)
        return bool(needed > _MEMORY_SHARE * free)


def free_memory() -> int:
    """Return the bytes of main memory available without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
