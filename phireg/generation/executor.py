"""The executor as a backend: in one process, or led by rank 0 of one process for each rank."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from phireg import device as devices
from phireg.errors import PhiregError, UsageError
from phireg.executor import Executor, ModelSpec, Sampling, read_spec, stream
from phireg.executor import load as load_checkpoint
from phireg.generation.backend import Description, Options
from phireg.generation.checks import check_beams, check_continuations

# A chat may leave the other ranks waiting for its next line for as long as it likes.
_PATIENCE = timedelta(days=30)


def describe(place: Path, options: Options) -> Description:
    """See :class:`phireg.generation.backend.Opener`."""
    devices.pick_device(options.device)
    return _description(read_spec(place))


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


def process_rank() -> tuple[int, int]:
    """The rank of this process and the number of processes, by the environment torchrun sets.

    Raises:
        UsageError: the environment is not one that torchrun makes.
    """
    try:
        rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError:
        rank, world_size = -1, 0
    if not 0 <= rank < world_size:
        raise UsageError(
            "the environment variables RANK and WORLD_SIZE are not what torchrun sets",
            hint="unset them, or start with torchrun.",
        )
    return rank, world_size


def load(place: Path, options: Options) -> ExecutorBackend:
    """Load a checkpoint; as rank 0 of several processes, wait for the others first.

    Raises:
        PhiregError: as :func:`phireg.executor.load`.
    """
    device = devices.pick_device(options.device)
    led = process_rank()[1] > 1
    if led:
        _join(device)
    devices.measure_memory(device)
    try:
        model = load_checkpoint(place, device, options.dtype, options.offload, led)
    except BaseException:
        if led:
            dist.destroy_process_group()
        raise
    return ExecutorBackend(model, led=led)


def follow(place: Path, options: Options) -> None:
    """Do as rank 0 says, until it says to end or is gone.

    Raises:
        PhiregError: this rank's file is not what it must be.
    """
    device = devices.pick_device(options.device)
    try:
        _join(device)
        model = load_checkpoint(place, device, options.dtype, options.offload, distributed=True)
        try:
            _obey(model)
        finally:
            model.release()
    except RuntimeError as error:
        if not _parted(error):  # whoever left has said why
            raise
    else:
        dist.destroy_process_group()


def _obey(model: Executor) -> None:
    while (request := _receive()) is not None:
        if "rows" in request:
            for prompt, continuation in request["rows"]:
                _mean_nll(model, prompt, continuation)
            continue
        prompts, count = request["prompts"], request["max_new_tokens"]
        keys = ("temperature", "top_k", "top_p", "seed")
        sampling = Sampling(**{key: request[key] for key in keys})
        for _ in stream(model, prompts, count, request["stop_ids"], sampling):
            pass


class ExecutorBackend:
    """Continues prompts with a checkpoint.

    Args:
        model: the loaded checkpoint.
        led: there are processes of other ranks, which must be told what to do.
    """

    name = "executor"

    def __init__(self, model: Executor, *, led: bool = False) -> None:
        self.model = model
        self.led = led
        self.description = _description(model.spec)
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.processes = model.spec.tp_size if led else 1
        self._busy = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling,
        num_beams: int = 1,
    ) -> list[list[int]]:
        """Continue a batch; see :class:`phireg.generation.backend.Backend`.

        Raises:
            UsageError: more than one beam; or as :func:`phireg.executor.stream`.
        """
        check_beams(self.description, num_beams, sampling)
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
        """Continue a batch; see :func:`phireg.executor.stream`.

        With several processes, it must be taken to its end.
        """
        request = {
            "prompts": [list(prompt) for prompt in prompts],
            "max_new_tokens": max_new_tokens,
            "stop_ids": sorted(stop_ids),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        with self._together(request):
            yield from stream(self.model, prompts, max_new_tokens, stop_ids, sampling)

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """See :class:`phireg.generation.backend.Backend`.

        Raises:
            UsageError: the model cannot take a prompt with its continuation.
        """
        rows = check_continuations(self.description, prompts, continuations)
        with self._together({"rows": rows}):
            return [_mean_nll(self.model, *row) for row in rows]

    def peak_memory(self) -> int:
        """Bytes at most, of this process's GPU or of its main memory."""
        return devices.peak_memory(self.model.device)

    def close(self) -> None:
        """Let the other processes end, unless they are in the middle of a batch and must die."""
        if self.led:
            if not self._busy:
                _send(None)
            self.model.release()
            dist.destroy_process_group()

    @contextmanager
    def _together(self, request: dict[str, Any]) -> Iterator[None]:
        """Have the other processes do the same as this one does inside."""
        if self.led:
            _send(request)
        self._busy = True
        try:
            yield
        except RuntimeError as error:
            if _parted(error):
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
    # What ranks tell each other besides tensors goes through gloo.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)


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


def _parted(error: RuntimeError) -> bool:
    """Whether another process has closed its connection."""
    return any(words in str(error) for words in ("closed by peer", "reset by peer", "Broken pipe"))
