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

from phireg.errors import PhiregError, UsageError
from phireg.executor import Executor, Sampling, load, stream

# A chat may leave the other ranks waiting for its next line for as long as it likes.
_PATIENCE = timedelta(days=30)


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


def pick_device(name: str) -> torch.device:
    """The device a user means.

    Args:
        name: "auto" (a GPU if there is one), "cpu", "cuda" (of several processes, each takes its
            own) or "cuda:N".

    Raises:
        UsageError: there is no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, number = (
        ("cuda" if gpus else "cpu").partition(":") if name == "auto" else (name.partition(":"))
    )
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind != "cuda" or not (number.isdecimal() or name in ("cuda", "auto")):
        raise UsageError(f"unknown device '{name}'", hint="known: auto, cpu, cuda, cuda:N.")
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= gpus:
        raise UsageError(
            f"there is no GPU {index}: torch {torch.__version__} sees {gpus}",
            hint="use --device cpu, or check the driver and CUDA_VISIBLE_DEVICES.",
        )
    return torch.device("cuda", index)


class ExecutorBackend:
    """Continues prompts with a checkpoint.

    Args:
        model: the loaded checkpoint.
        led: there are processes of other ranks, which must be told what to do.
    """

    def __init__(self, model: Executor, *, led: bool = False) -> None:
        self.model = model
        self.led = led
        self._busy = False

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
        if self.led:
            _send(
                {
                    "prompts": [list(prompt) for prompt in prompts],
                    "max_new_tokens": max_new_tokens,
                    "stop_ids": sorted(stop_ids),
                    "temperature": sampling.temperature,
                    "top_k": sampling.top_k,
                    "top_p": sampling.top_p,
                    "seed": sampling.seed,
                }
            )
        self._busy = True
        try:
            yield from stream(self.model, prompts, max_new_tokens, stop_ids, sampling)
        except RuntimeError as error:
            if _parted(error):
                raise PhiregError("the process of another rank has ended") from None
            raise
        self._busy = False

    def close(self) -> None:
        """Let the other processes end, unless they are in the middle of a batch and must die."""
        if self.led:
            if not self._busy:
                _send(None)
            dist.destroy_process_group()


@contextmanager
def opened(
    checkpoint_dir: Path, device: torch.device, dtype: str | None, offload: bool | None
) -> Iterator[ExecutorBackend]:
    """Load a checkpoint; as rank 0 of several processes, wait for the others first.

    Raises:
        PhiregError: as :func:`phireg.executor.load`.
    """
    led = process_rank()[1] > 1
    if led:
        _join(device)
    backend = ExecutorBackend(load(checkpoint_dir, device, dtype, offload, led), led=led)
    try:
        yield backend
    finally:
        backend.close()


def follow(
    checkpoint_dir: Path, device: torch.device, dtype: str | None, offload: bool | None
) -> None:
    """Do as rank 0 says, until it says to end or is gone.

    Raises:
        PhiregError: this rank's file is not what it must be.
    """
    try:
        _join(device)
        model = load(checkpoint_dir, device, dtype, offload, distributed=True)
        while (request := _receive()) is not None:
            prompts, count = request["prompts"], request["max_new_tokens"]
            keys = ("temperature", "top_k", "top_p", "seed")
            sampling = Sampling(**{key: request[key] for key in keys})
            for _ in stream(model, prompts, count, request["stop_ids"], sampling):
                pass
    except RuntimeError as error:
        if not _parted(error):  # whoever left has said why
            raise
    else:
        dist.destroy_process_group()


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
