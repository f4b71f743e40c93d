"""The executor as a backend, in one process or in one process per rank led by rank 0."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from phireg import device as devices
from phireg.errors import PhiregError
from phireg.executor import Executor, ModelSpec, Sampling, read_spec, stream
from phireg.executor import load as load_checkpoint
from phireg.generation.backend import Description, Options
from phireg.generation.limits import check_batch, check_continuations, check_request
from phireg.generation.processes import process_rank

__all__ = ["ExecutorBackend", "describe", "load", "process_rank", "run_worker"]

# Workers of a chat wait for its next line, however long the user takes.
_TIMEOUT = timedelta(days=30)


def describe(directory: Path, options: Options) -> Description:
    """See :class:`phireg.generation.backend.Opener`."""
    devices.pick_device(options.device)
    return _description(read_spec(directory))


def _description(spec: ModelSpec) -> Description:
    ranks = spec.tp_size
    return Description(
        vocab_size=spec.vocab_size,
        positions=spec.max_position_embeddings,
        tp_size=ranks,
        processes=(1, ranks) if ranks > 1 else (1,),
        start=f"torchrun --nproc-per-node {ranks} -m",
        max_beams=1,
    )


def load(directory: Path, options: Options) -> ExecutorBackend:
    """Load a checkpoint; as rank 0 of several processes, wait for the others first."""
    device = devices.pick_device(options.device)
    leads = process_rank()[1] > 1
    if leads:
        _join(device)
    devices.measure_memory(device)
    try:
        model = load_checkpoint(directory, device, options.dtype, options.offload, leads)
    except BaseException:
        if leads:
            dist.destroy_process_group()
        raise
    return ExecutorBackend(model, leads_workers=leads)


def run_worker(directory: Path, options: Options) -> None:
    """Run the requests of rank 0 until it ends or disconnects."""
    device = devices.pick_device(options.device)
    try:
        _join(device)
        model = load_checkpoint(directory, device, options.dtype, options.offload, distributed=True)
        try:
            _serve(model)
        finally:
            model.release()
    except RuntimeError as error:
        if not _is_disconnect(error):  # the process that ended has reported why
            raise
    else:
        dist.destroy_process_group()


def _serve(model: Executor) -> None:
    """Worker loop: run requests broadcast by rank 0."""
    while (request := _receive()) is not None:
        if "rows" in request:
            for prompt, continuation in request["rows"]:
                _mean_nll(model, prompt, continuation)
            continue
        prompts, count = request["prompts"], request["max_new_tokens"]
        sampling = Sampling(**request["sampling"])
        for _ in stream(model, prompts, count, request["stop_ids"], sampling):
            pass


class ExecutorBackend:
    """Run a checkpoint; ``leads_workers`` if other processes hold its other ranks."""

    name = "executor"

    def __init__(self, model: Executor, *, leads_workers: bool = False) -> None:
        self.model = model
        self.leads_workers = leads_workers
        self.description = _description(model.spec)
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.processes = model.spec.tp_size if leads_workers else 1
        self._busy = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling,
        num_beams: int = 1,
    ) -> list[list[int]]:
        """Continue a batch; see :class:`phireg.generation.backend.Backend`."""
        check_batch(self.description, len(prompts), num_beams, sampling)
        rows: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, stop_ids, sampling):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None and token not in stop_ids:
                    row.append(token)
        return rows

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling,
    ) -> Iterator[list[int | None]]:
        """Continue a batch step by step; see :class:`phireg.generation.backend.Backend`."""
        check_request(self.description, prompts, max_new_tokens, sampling)
        request = {
            "prompts": [list(prompt) for prompt in prompts],
            "max_new_tokens": max_new_tokens,
            "stop_ids": sorted(stop_ids),
            "sampling": asdict(sampling),
        }
        with self._broadcast(request):
            yield from stream(self.model, prompts, max_new_tokens, stop_ids, sampling)

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """See :class:`phireg.generation.backend.Backend`."""
        rows = check_continuations(self.description, prompts, continuations)
        with self._broadcast({"rows": rows}):
            return [_mean_nll(self.model, *row) for row in rows]

    def peak_memory(self) -> int:
        """Return the peak in bytes of this process's GPU or main memory."""
        return devices.peak_memory(self.model.device)

    def close(self) -> None:
        """End the workers; those in the middle of a batch end when the connection closes."""
        if self.leads_workers:
            if not self._busy:
                _send(None)
            self.model.release()
            dist.destroy_process_group()

    @contextmanager
    def _broadcast(self, request: dict[str, Any]) -> Iterator[None]:
        """Let the workers run the request that this process runs inside the context."""
        if self.leads_workers:
            _send(request)
        self._busy = True
        try:
            yield
        except RuntimeError as error:
            if _is_disconnect(error):
                raise PhiregError("the process of another rank has ended") from None
            raise
        self._busy = False


def _mean_nll(model: Executor, prompt: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([prompt + continuation], device=model.device)
    logits = model(ids[:, :-1])[0, len(prompt) - 1 :]
    return float(functional.cross_entropy(logits, ids[0, len(prompt) :]))


def _join(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Requests go through gloo, tensors of a GPU through NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)


def _send(request: dict[str, Any] | None) -> None:
    content = b"" if request is None else json.dumps(request).encode()
    dist.broadcast(torch.tensor([len(content)]), src=0)
    if content:
        dist.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), src=0)


def _receive() -> dict[str, Any] | None:
    length = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(length, src=0)
    if not length:
        return None
    content = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, src=0)
    request: dict[str, Any] = json.loads(bytes(content.tolist()))
    return request


def _is_disconnect(error: RuntimeError) -> bool:
    return any(words in str(error) for words in ("closed by peer", "reset by peer", "Broken pipe"))
