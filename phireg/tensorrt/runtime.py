"""The backend of engines that phireg built: generation as the executor's, by TensorRT's runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phireg import device as devices
from phireg.errors import UsageError
from phireg.executor.decoder import Sampling, choose
from phireg.executor.generate import rows_of, tokens_of
from phireg.generation.backend import (
    KEYS_STAY,
    Description,
    LongRope,
    Options,
    Request,
    check_engine_options,
)
from phireg.generation.limits import check_request, mean_nll
from phireg.generation.processes import process_rank, run_worker
from phireg.tensorrt import network as contract
from phireg.tensorrt.engine import NativeEngine, read_native
from phireg.tensorrt.session import Session

__all__ = ["TensorRTBackend", "describe", "load", "process_rank", "run_worker"]


def describe(directory: Path, options: Options) -> Description:
    """See :class:`phireg.generation.backend.Opener`; TensorRT is not needed for this."""
    check_engine_options(options)
    return _description(read_native(directory))


def _description(engine: NativeEngine) -> Description:
    return Description(
        vocab_size=engine.spec.vocab_size,
        positions=engine.limits.max_seq_len,
        tp_size=engine.spec.tp_size,
        max_input=engine.limits.max_input_len,
        max_batch=engine.limits.max_batch_size,
        max_beams=1,
        long_rope=None
        if engine.spec.rope.short is None
        else LongRope(engine.spec.rope.original, True, KEYS_STAY),
    )


def load(directory: Path, options: Options) -> TensorRTBackend:
    """Load an engine on a GPU."""
    check_engine_options(options)
    engine = read_native(directory)
    device = engine_device(options.device)
    devices.measure_memory(device)
    return TensorRTBackend(Session(engine, device, options.weights_dir))


def engine_device(name: str) -> torch.device:
    """Return the GPU to run an engine on."""
    if name == "cpu" or not torch.cuda.is_available():
        raise UsageError(
            "an engine runs on a GPU only"
            + ("" if name == "cpu" else f", and torch {torch.__version__} sees none"),
            hint="run the checkpoint that it was built from: it needs none.",
        )
    return devices.pick_device(name)


class TensorRTBackend:
    """A loaded engine; see :class:`phireg.generation.backend.Backend`."""

    name = "tensorrt"
    processes = 1

    def __init__(self, session: Session) -> None:
        self.session = session
        self.description = _description(session.engine)
        self.device = str(session.device)
        self.dtype = session.spec.dtype

    def generate(self, request: Request) -> list[list[int]]:
        """Continue a batch."""
        return rows_of(self.stream(request), len(request.prompts), request.stop_ids)

    def stream(self, request: Request) -> Iterator[list[int | None]]:
        """Continue a batch step by step."""
        check_request(self.description, request)
        decoder = EngineDecoder(self.session, len(request.prompts), request.sampling)
        decoder.prefill(request.prompts, request.sampling.seed)
        lengths = list(map(len, request.prompts))
        stops = frozenset(request.stop_ids)
        yield from tokens_of(decoder, lengths, request.max_new_tokens, stops)

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Score continuations, in nats."""
        return mean_nll(self, prompts, continuations, partial(prompt_logits, self.session))

    def peak_memory(self) -> int:
        """Return the peak in bytes of what torch allocated: caches and buffers, not the engine."""
        return devices.peak_memory(self.session.device)

    def close(self) -> None:
        """Free the engine."""
        self.session.close()


def prompt_logits(session: Session, ids: Sequence[int], total: int = 0) -> torch.Tensor:
    """Return one text's logits, float32 [tokens, vocabulary]; ``total`` chooses its factors."""
    session.begin(1)
    chunk, parts = session.limits.max_chunk_len, []
    long = [(total or len(ids)) > session.spec.rope.original]
    for start in range(0, len(ids), chunk):
        part = list(ids[start : start + chunk])
        last = torch.arange(len(part), dtype=torch.int32)
        parts.append(session.feed([part], [start], long, last))
    return torch.cat(parts)


class EngineDecoder:
    """Generates for one batch as ``Decoder`` does; a row's factors go by its own tokens."""

    def __init__(self, session: Session, batch: int, sampling: Sampling) -> None:
        spec, device = session.spec, session.device
        self.session, self.batch, self.sampling = session, batch, sampling
        self.dtype = session.dtype
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        session.begin(batch)
        self._inputs = {
            contract.INPUT_IDS: torch.zeros(batch, 1, dtype=torch.int32, device=device),
            contract.PAST_LENGTHS: torch.zeros(batch, dtype=torch.int32, device=device),
            contract.LAST_TOKENS: torch.arange(batch, dtype=torch.int32, device=device),
        }
        if spec.rope.short is not None:
            self._inputs[contract.ROPE_OFFSETS] = torch.zeros_like(self._inputs["past_lengths"])
        self._logits = torch.zeros(batch, spec.vocab_size, dtype=torch.float32, device=device)
        columns = 0 if sampling.greedy else spec.vocab_size
        self._noise = torch.ones(batch, columns, dtype=torch.float32, device=device)
        self._random = torch.Generator(device)
        self._graph: Any = None

    def prefill(self, prompts: Sequence[Sequence[int]], seed: int) -> None:
        """Run the prompts in chunks and choose each row's first token, into ``token``."""
        session, lengths = self.session, [len(prompt) for prompt in prompts]
        long = [length > session.spec.rope.original for length in lengths]
        logits = torch.empty(0)
        for starts, counts in contract.chunks(lengths, session.limits.max_chunk_len):
            parts = zip(prompts, starts, counts, strict=True)
            rows = [prompt[start : start + count] for prompt, start, count in parts]
            width = max(counts)
            last = torch.tensor([row * width + count - 1 for row, count in enumerate(counts)])
            logits = session.feed(rows, starts, long, last.to(torch.int32))
        self._random.manual_seed(seed)
        self._draw()
        self.token.copy_(choose(logits, self.sampling, self._noise))
        self._inputs[contract.PAST_LENGTHS].copy_(torch.tensor(lengths))
        session.follow()
        with session.stream():
            session.bind("generation", self._inputs, self._logits)

    def step(self) -> None:
        """Put ``token`` into the cache and choose the next one, without waiting for the GPU."""
        session = self.session
        session.follow()
        with session.stream():
            self._draw()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step()
                # The first step was an ordinary one: whatever is prepared once is prepared.
                if session.can_capture():
                    self._graph = self._captured()
        session.join()

    def _step(self) -> None:
        inputs, past = self._inputs, self._inputs[contract.PAST_LENGTHS]
        inputs[contract.INPUT_IDS].copy_(self.token.clamp(min=0)[:, None])
        if contract.ROPE_OFFSETS in inputs:
            long = past + 1 > self.session.spec.rope.original
            inputs[contract.ROPE_OFFSETS].copy_(self.session.rope_offsets(long))
        self.session.execute("generation")
        self.token.copy_(choose(self._logits, self.sampling, self._noise))
        past += 1

    def _captured(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.session.device)):
            self._step()
        return graph

    def _draw(self) -> None:
        if not self.sampling.greedy:
            self._noise.exponential_(generator=self._random)
