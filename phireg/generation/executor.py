"""The executor as a backend, in one process or in one process per rank led by rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from phireg import device as devices
from phireg.errors import PhiregError
from phireg.executor import Executor, ModelSpec, read_meaning, stream
from phireg.executor import load as load_checkpoint
from phireg.executor.finite import NotFiniteError, dtype_name
from phireg.executor.generate import rows_of
from phireg.generation.backend import KEYS_STAY, Description, LongRope, Options, Request
from phireg.generation.limits import check_request, mean_nll
from phireg.generation.processes import process_rank

__all__ = ["ExecutorBackend", "describe", "load", "process_rank", "run_worker"]

_Result = TypeVar("_Result")

# Workers of a chat wait for its next line, however long the user takes.
_TIMEOUT = timedelta(days=30)


def describe(directory: Path, options: Options) -> Description:
    """See :class:`phireg.generation.backend.Opener`."""
    devices.pick_device(options.device)
    return _description(read_meaning(directory))


def _description(spec: ModelSpec) -> Description:
    ranks = spec.tp_size
    return Description(
        vocab_size=spec.vocab_size,
        positions=spec.max_position_embeddings,
        tp_size=ranks,
        processes=(1, ranks) if ranks > 1 else (1,),
        start=f"torchrun --nproc-per-node {ranks} --no-python",
        max_beams=1,
        long_rope=None
        if spec.rope.short is None
        else LongRope(spec.rope.original, True, KEYS_STAY),
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
    while (request := _exchange()) is not None:
        function, arguments = request
        with suppress(NotFiniteError):  # rank 0 reports the same
            for _ in function(model, *arguments):
                pass


class ExecutorBackend:
    """Run a checkpoint; ``leads_workers`` if other processes hold its other ranks."""

    name = "executor"

    def __init__(self, model: Executor, *, leads_workers: bool = False) -> None:
        self.model = model
        self.leads_workers = leads_workers
        self.description = _description(model.spec)
        self._device = model.device
        self.device = str(model.device)
        self.dtype = dtype_name(model.dtype)
        self.processes = model.spec.tp_size if leads_workers else 1
        self._busy = False

    def generate(self, request: Request) -> list[list[int]]:
        """Continue a batch."""
        return rows_of(self.stream(request), len(request.prompts), request.stop_ids)

    def stream(self, request: Request) -> Iterator[list[int | None]]:
        """Continue a batch step by step."""
        check_request(self.description, request)
        rows, stops = [list(prompt) for prompt in request.prompts], frozenset(request.stop_ids)
        count, sampling = request.max_new_tokens, request.sampling
        yield from self._on_all_ranks(stream, rows, count, stops, sampling)

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Score continuations, in nats."""

        def logits_of(ids: list[int]) -> Tensor:
            (logits,) = self._on_all_ranks(_logits, ids)
            return logits

        return mean_nll(self, prompts, continuations, logits_of)

    def peak_memory(self) -> int:
        """Return the peak in bytes of this process's GPU or main memory."""
        return devices.peak_memory(self._device)

    def close(self) -> None:
        """Free the model; workers in the middle of a batch end when the connection closes."""
        if self.leads_workers and not self._busy:
            _exchange(None)
        self.model.release()
        del self.model
        devices.return_memory(self._device)
        if self.leads_workers:
            dist.destroy_process_group()

    def _on_all_ranks(
        self, function: Callable[..., Iterator[_Result]], *arguments: Any
    ) -> Iterator[_Result]:
        """Run a function of the model here and in the workers; arguments are pickled."""
        if self.leads_workers:
            _exchange((function, arguments))
        self._busy = True
        try:
            yield from function(self.model, *arguments)
        except NotFiniteError:
            self._busy = False  # all ranks have the same logits, and have stopped
            raise
        except RuntimeError as error:
            if _is_disconnect(error):
                raise PhiregError("the process of another rank has ended") from None
            raise
        self._busy = False


def _logits(model: Executor, ids: list[int]) -> Iterator[Tensor]:
    yield model(torch.tensor([ids], device=model.device))[0]


def _join(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Requests go through gloo, tensors of a GPU through NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)


def _exchange(request: Any = None) -> Any:
    """Return the request that rank 0 gives, in every process."""
    requests = [request]
    dist.broadcast_object_list(requests, src=0, device=torch.device("cpu"))
    return requests[0]


def _is_disconnect(error: RuntimeError) -> bool:
    return any(words in str(error) for words in ("closed by peer", "reset by peer", "Broken pipe"))
