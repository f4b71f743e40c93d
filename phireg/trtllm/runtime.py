"""The backend of TensorRT-LLM's own runtime, on an engine that trtllm-build made.

Written against the documented interface of the releases 0.11 to 1.3.0rc20 and tested against a
stand-in with that interface. It has not been run against TensorRT-LLM itself.
"""

from __future__ import annotations

import atexit
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.nn import functional

from phireg.errors import PhiregError, UsageError
from phireg.executor import Sampling
from phireg.generation.backend import Description, Options
from phireg.generation.limits import check_continuations, check_request
from phireg.trtllm.engine import Engine, read_engine
from phireg.trtllm.model_runner import Output, Runner, installed, load_runner, quiet_stdout
from phireg.trtllm.mpi import Communicator, communicator, process_rank
from phireg.trtllm.releases import public_version

__all__ = ["TrtllmBackend", "describe", "load", "process_rank", "run_worker"]


def describe(directory: Path, options: Options) -> Description:
    """See :class:`phireg.generation.backend.Opener`; TensorRT-LLM is not needed for this."""
    settled = {"--dtype": options.dtype, "--offload and --no-offload": options.offload}
    for name, value in settled.items():
        if value is not None:
            raise UsageError(
                f"{name} cannot be chosen for an engine: it was decided when it was built",
                hint="leave it out.",
            )
    if options.device not in ("auto", "cuda"):
        raise UsageError(
            f"--device {options.device}: TensorRT-LLM takes the GPU by the process's rank",
            hint="leave it out, and choose GPUs by CUDA_VISIBLE_DEVICES.",
        )
    return _description(read_engine(directory))


def load(directory: Path, options: Options) -> TrtllmBackend:
    """Load this rank's part of an engine; all ranks of mpirun do so at the same time."""
    return _load(_check(directory, options))


def run_worker(directory: Path, options: Options) -> None:
    """Run the requests that rank 0 sends until it closes its backend."""
    try:
        engine = _check(directory, options)
    except PhiregError:
        return  # rank 0 reports the same, and must not be killed before that
    backend = _load(engine)
    try:
        backend.run_requests()
    except BaseException:
        backend.abort_at_exit()
        raise


def _check(directory: Path, options: Options) -> Engine:
    """The engine, after the checks that end alike on every rank."""
    describe(directory, options)
    engine, (_, size) = read_engine(directory), process_rank()
    if size != engine.world_size:
        raise UsageError(
            f"{directory} was built for {engine.world_size} rank(s), and the number of processes "
            f"is {size}",
            hint=f"mpirun -n {engine.world_size} phireg run {directory} ...",
        )
    return engine


def _load(engine: Engine) -> TrtllmBackend:
    release = installed()
    rank, size = process_rank()
    ranks = communicator() if size > 1 else None
    try:
        runner = load_runner(engine, release, rank)
    except BaseException:
        if ranks is not None:  # the others may wait for this one for ever
            atexit.register(ranks.Abort, 1)
        raise
    return TrtllmBackend(runner, engine, release, ranks)


class TrtllmBackend:
    """A loaded engine; see :class:`phireg.generation.backend.Backend`.

    With several ranks, ``ranks`` is the communicator of all of them.
    """

    name = "tensorrt-llm"
    device = "cuda"

    def __init__(
        self, runner: Runner, engine: Engine, release: str, ranks: Communicator | None
    ) -> None:
        self.runner = runner
        self.engine = engine
        self.description = _description(engine)
        self.dtype = engine.dtype
        self.processes = engine.world_size
        self._release = release
        self._ranks = ranks
        self._busy = False
        self._peak = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling,
        num_beams: int = 1,
    ) -> list[list[int]]:
        """Continue a batch."""
        check_request(self.description, prompts, max_new_tokens, sampling, num_beams)
        stops = sorted(stop_ids)
        request = _request(prompts, max_new_tokens, stops, sampling, num_beams)
        with self._on_all_ranks(request):
            rows = self._rows(self._call(request), prompts, max_new_tokens)
        return [row[: _end(row, stops)] for row in rows]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling,
    ) -> Iterator[list[int | None]]:
        """Continue a batch step by step.

        Rows may be ahead of others. A row that the runtime ended without giving its stop id gets
        the first of the stop ids.
        """
        check_request(self.description, prompts, max_new_tokens, sampling)
        stops = sorted(stop_ids)
        request = _request(prompts, max_new_tokens, stops, sampling, 1) | {"streaming": True}
        rows: list[list[int]] = [[] for _ in prompts]
        with self._on_all_ranks(request):
            for output in self._steps(request):
                before, rows = rows, self._rows(output, prompts, max_new_tokens)
                rows = [row[: _end(row, stops) + 1] for row in rows]
                new = [row[len(old) :] for row, old in zip(rows, before, strict=True)]
                yield from map(list, zip_longest(*new))
        unfinished = [_end(row, stops) == len(row) < max_new_tokens for row in rows]
        if stops and any(unfinished):
            yield [stops[0] if row else None for row in unfinished]

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float] | None:
        """The mean of -ln p over each continuation's tokens.

        None unless the engine was built with ``--gather_context_logits`` (or
        ``--gather_all_token_logits``).
        """
        if not self.engine.gathers_logits:
            return None
        means = []
        for prompt, continuation in check_continuations(self.description, prompts, continuations):
            # One token is generated because the runtime wants one; the input's logits count.
            request = _request([prompt + continuation[:-1]], 1, [], Sampling(), 1)
            with self._on_all_ranks(request):
                logits = self._call(request)["context_logits"][0]
            picked = logits[len(prompt) - 1 :, : self.engine.vocab_size].float().cpu()
            means.append(float(functional.cross_entropy(picked, torch.tensor(continuation))))
        return means

    def peak_memory(self) -> int | None:
        """Bytes in use on the GPU at most after a batch, of all programs that use it.

        The runtime keeps a KV cache, which by default takes most of what was free.
        """
        return self._peak or None

    def close(self) -> None:
        """Let the other ranks end, or abort them if they are in the middle of a batch."""
        if self._ranks is not None:
            if self._busy:
                self.abort_at_exit()
            else:
                self._ranks.bcast(None, root=0)
        del self.runner

    def run_requests(self) -> None:
        """Worker loop: run the requests that rank 0 broadcasts until it closes."""
        assert self._ranks is not None
        while (request := self._ranks.bcast(None, root=0)) is not None:
            if request.get("streaming"):
                for _ in self._steps(request):
                    pass
            else:
                self._call(request)

    def abort_at_exit(self) -> None:
        """Abort all ranks when this process ends: they may wait for it for ever."""
        if self._ranks is not None:
            atexit.register(self._ranks.Abort, 1)

    @contextmanager
    def _on_all_ranks(self, request: dict[str, Any]) -> Iterator[None]:
        if self._ranks is not None:
            self._ranks.bcast(request, root=0)
        self._busy = True
        yield
        self._busy = False
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self._peak = max(self._peak, total - free)

    def _call(self, request: dict[str, Any]) -> Any:
        with self._runtime():
            return self.runner.generate(**self._arguments(request))

    def _steps(self, request: dict[str, Any]) -> Iterator[Output]:
        steps = iter(self._call(request))
        while True:
            with self._runtime():
                output = next(steps, None)
            if output is None:
                return
            yield output

    @contextmanager
    def _runtime(self) -> Iterator[None]:
        """Keep TensorRT-LLM off standard output, and report whatever it raises."""
        with quiet_stdout(), torch.no_grad():
            try:
                yield
            except Exception as error:  # which classes it raises is not documented
                raise PhiregError(f"TensorRT-LLM {self._release}: {error}") from None

    def _arguments(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request with tensors, and without what the release does not know."""
        arguments = dict(request)
        rows = arguments.pop("input_ids")
        arguments["batch_input_ids"] = [torch.tensor(row, dtype=torch.int32) for row in rows]
        # 0.11 takes one list for all rows. It goes on to the last token then; rows are cut.
        if public_version(self._release) < Version("0.12.0.dev0"):
            arguments.pop("stop_words_list", None)
        return arguments

    def _rows(
        self, output: Output, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """The first beam's new tokens of every row."""
        ids, lengths = output["output_ids"][:, 0].tolist(), output["sequence_lengths"].tolist()
        return [
            row[len(prompt) : min(ends[0], len(prompt) + max_new_tokens)]
            for row, ends, prompt in zip(ids, lengths, prompts, strict=True)
        ]


def _end(row: Sequence[int], stops: Sequence[int]) -> int:
    """The place of the first stop id, or behind the row."""
    return next((n for n, token in enumerate(row) if token in stops), len(row))


def _description(engine: Engine) -> Description:
    return Description(
        vocab_size=engine.vocab_size,
        positions=engine.max_seq_len,
        tp_size=engine.tp_size,
        processes=(engine.world_size,),
        start=f"mpirun -n {engine.world_size}",
        max_input=engine.max_input_len,
        max_batch=engine.max_batch_size,
        max_beams=engine.max_beam_width,
    )


def _request(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Sequence[int],
    sampling: Sampling,
    num_beams: int,
) -> dict[str, Any]:
    """The arguments of ``generate``, in plain values that can be sent to other ranks."""
    settings = asdict(sampling)
    seed = settings.pop("seed")
    if sampling.greedy:
        settings = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}
    end = stops[0] if stops else -1
    request = settings | {
        "input_ids": [list(prompt) for prompt in prompts],
        "max_new_tokens": max_new_tokens,
        "end_id": end,
        "pad_id": max(end, 0),
        "num_beams": num_beams,
        "random_seed": seed,
        "return_dict": True,
        "output_sequence_lengths": True,
    }
    if len(stops) > 1:
        request["stop_words_list"] = [[[stop] for stop in stops[1:]]] * len(prompts)
    if num_beams > 1:
        # As TensorRT-LLM's summarize.py searches with both models.
        request |= {"length_penalty": 1.0, "early_stopping": 1}
    return request
