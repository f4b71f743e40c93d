"""An engine loaded by TensorRT's runtime, with torch's memory as its buffers.

Written against the documented interface of TensorRT 11 and TensorRT for RTX 1.7, and tested against
a stand-in of it that evaluates the network. Nothing here has been run on a GPU (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phireg.errors import CheckError, EngineError
from phireg.executor.sources import Source, open_ranks
from phireg.reader.tensors import rank_tensors
from phireg.tensorrt import network as contract
from phireg.tensorrt.engine import NativeEngine, checkpoint_of
from phireg.tensorrt.job import PROFILES
from phireg.tensorrt.package import load_engine, load_package


class Session:
    """A one-rank engine on a GPU, with the caches of the batch at hand; buffers are torch's.

    ``weights`` is the checkpoint whose tensors an engine with separate weights takes.
    """

    def __init__(
        self, engine: NativeEngine, device: torch.device, weights: Path | None = None
    ) -> None:
        if engine.spec.tp_size > 1:
            raise EngineError(
                f"{engine.directory} has {engine.spec.tp_size} ranks, and phireg runs engines of "
                "one rank",
                hint="convert with --tp-size 1 and build again, or run the checkpoint on several "
                "GPUs: phireg run CKPT.",
            )
        self.engine = engine
        self.spec, self.limits = engine.spec, engine.limits
        self.device = device
        self.dtype: torch.dtype = getattr(torch, self.spec.dtype)
        self.package = load_package(engine.backend)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        source = _source(engine, weights)  # before the engine, which takes long
        self._contexts, shapes = self._load()
        self._parameters: dict[str, Tensor] = {}
        if source is not None:
            for name, shape in shapes.items():
                self._parameters[name] = source(name).to(device).reshape(shape).contiguous()
        self._caches: dict[str, Tensor] = {}
        self._batch = 0

    def begin(self, batch: int) -> None:
        """Make room for a batch; what is in the caches means nothing any more."""
        if batch == self._batch:
            return
        self._caches.clear()  # before there are others
        spec = self.spec
        shape = (batch, spec.rank_kv_heads, self.limits.max_seq_len, spec.head_size)
        for layer in range(spec.num_layers):
            for part in "kv":
                name = contract.cache_name(part, layer)
                self._caches[name] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._batch = batch

    def stream(self) -> AbstractContextManager[Any]:
        """Return a context in which torch's work joins the engine's, on one stream."""
        if self._stream is None:
            return nullcontext()
        stream: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return stream

    def can_capture(self) -> bool:
        """Return whether a step of generation can be part of a CUDA graph."""
        if self._stream is None:
            return False
        context = self._contexts["generation"]
        ask = getattr(context, "is_stream_capturable", None)  # TensorRT for RTX has it
        return ask is None or bool(ask(self._stream.cuda_stream))

    def bind(self, profile: str, inputs: Mapping[str, Tensor], logits: Tensor) -> None:
        """Give the profile "prompt" or "generation" buffers, which stay until others replace them.

        Caches and weights are not among the ``inputs``; ``logits`` is float32 [R, vocab_size].
        """
        context = self._contexts[profile]
        log = self.package.log
        buffers = {**self._parameters, **self._caches, **inputs}
        for name, tensor in buffers.items():
            shaped = context.set_input_shape(name, tuple(tensor.shape))
            log.check(f"shape {tuple(tensor.shape)} of {name}", failed=not shaped)
        for layer in range(self.spec.num_layers):
            for part in "kv":  # the caches are updated where they lie
                cache = self._caches[contract.cache_name(part, layer)]
                buffers[contract.present_name(part, layer)] = cache
        for name, tensor in (buffers | {contract.LOGITS: logits}).items():
            assert tensor.is_contiguous()
            log.check(name, failed=not context.set_tensor_address(name, tensor.data_ptr()))

    def execute(self, profile: str) -> None:
        """Run a profile on what is bound to it, without waiting for the GPU."""
        done = self._contexts[profile].execute_async_v3(self._handle)
        self.package.log.check("to run", failed=not done)

    def rope_offsets(self, long: Tensor) -> Tensor:
        """Return the rows' offsets, int32 [batch], of those that take the long factors."""
        return long.to(torch.int32) * self.limits.max_seq_len

    def feed(
        self,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        long: Sequence[bool],
        last: Tensor,
        profile: str = "prompt",
    ) -> Tensor:
        """Run new tokens of every row, padded on the right; return float32 [R, vocab_size].

        The cache has the ``starts`` tokens before them; ``long`` rows take the long factors of long
        rope. ``last``, int32 [R], are the tokens to give logits of (row * longest + token). With
        one token of each row the ``profile`` may be "generation".
        """
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        inputs = {
            contract.INPUT_IDS: ids.to(self.device),
            contract.PAST_LENGTHS: torch.tensor(starts, dtype=torch.int32, device=self.device),
            contract.LAST_TOKENS: last.to(self.device),
        }
        if self.spec.rope.short is not None:
            inputs[contract.ROPE_OFFSETS] = self.rope_offsets(torch.tensor(long)).to(self.device)
        shape = (len(last), self.spec.vocab_size)
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        with self.stream():
            self.bind(profile, inputs, logits)
            self.execute(profile)
        self.synchronize()
        return logits

    def synchronize(self) -> None:
        """Wait for the engine's stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def join(self) -> None:
        """Let what follows on torch's current stream wait for the engine's."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def follow(self) -> None:
        """Let what follows on the engine's stream wait for torch's current one."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        """Free the engine and its buffers."""
        self._contexts.clear()
        self._caches.clear()
        self._parameters.clear()

    @property
    def _handle(self) -> int:
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    def _load(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """Load the engine; return a context for each profile, and the shapes of its weights."""
        package = self.package
        if package.version != self.engine.version:
            raise EngineError(
                f"{self.engine.directory} was built by {self.engine.backend} "
                f"{self.engine.version}, and {package.version} is installed",
                hint="build it again, or install that version.",
            )
        self._runtime, loaded = load_engine(package, self.engine.path(0))
        contexts = {}
        for number, name in enumerate(PROFILES):
            context = loaded.create_execution_context()
            package.log.check("a context", failed=context is None)
            chosen = context.set_optimization_profile_async(number, self._handle)
            package.log.check(f"profile {name}", failed=not chosen)
            contexts[name] = context
        self.synchronize()
        names = map(loaded.get_tensor_name, range(loaded.num_io_tensors))
        weights = rank_tensors(self.spec).keys() & set(names)
        return contexts, {name: tuple(loaded.get_tensor_shape(name)) for name in weights}


def _source(engine: NativeEngine, weights: Path | None) -> Source | None:
    """Return what reads the tensors that an engine with separate weights takes; None if none."""
    if engine.weights == "embedded":
        if weights is not None:
            raise CheckError(
                f"{engine.directory} has its weights inside: it takes no checkpoint",
                hint="leave out --weights-dir, or build with --weights separate.",
            )
        return None
    (source,) = open_ranks(checkpoint_of(engine, weights, "--weights-dir"), engine.spec, [0])
    return source
