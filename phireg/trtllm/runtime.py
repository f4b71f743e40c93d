"""The backend of TensorRT-LLM's own runtime, on an engine that trtllm-build wrote.

Written against the documented interface of the releases 0.11 to 1.3.0rc20 and tested against a
stand-in with that interface. It has not been run against TensorRT-LLM itself.

The runtime's documented classes are ModelRunnerCpp, which needs an engine for in-flight batching,
and ModelRunner. TensorRT-LLM is imported late: that takes long, and prints to standard output.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from phireg.errors import CheckError, PhiregError, UsageError
from phireg.executor import Sampling
from phireg.generation.backend import (
    KEYS_STAY,
    Description,
    LongRope,
    Options,
    Request,
    check_engine_options,
)
from phireg.generation.limits import check_request, mean_nll
from phireg.generation.mpi import Communicator, communicator, process_rank
from phireg.trtllm.builder import DISTRIBUTION, installed_version
from phireg.trtllm.engine import Engine, read_engine
from phireg.trtllm.releases import LAST, public_version

__all__ = ["TrtllmBackend", "describe", "load", "process_rank", "run_worker"]

Output = Mapping[str, Any]
"""``output_ids`` int32 [batch, beams, length], prompts included, padded at the end;
``sequence_lengths`` int32 [batch, beams]; ``context_logits``, if the engine gathers them: for each
row [tokens of the prompt, vocab_size or more]."""


Runner = Any
"""A ModelRunner. Its ``generate`` gives an ``Output``; with ``streaming=True`` an iterator of them,
each up to one more token. Ranks other than 0 may get something else."""


def describe(directory: Path, options: Options) -> Description:
    """See :class:`phireg.generation.backend.Opener`; TensorRT-LLM is not needed for this."""
    return _description(_read(directory, options))


def _read(directory: Path, options: Options) -> Engine:
    check_engine_options(options)
    if options.device not in ("auto", "cuda"):
        raise UsageError(
            f"--device {options.device}: TensorRT-LLM takes the GPU by the process's rank",
            hint="leave it out, and choose GPUs by CUDA_VISIBLE_DEVICES.",
        )
    return read_engine(directory)


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
    """Read the engine, with the checks that end alike on every rank."""
    engine, (_, size) = _read(directory, options), process_rank()
    if size != engine.world_size:
        raise UsageError(
            f"{directory} was built for {engine.world_size} rank(s), and the number of processes "
            f"is {size}",
            hint=f"mpirun -n {engine.world_size} phireg run {directory} ...",
        )
    return engine


def _load(engine: Engine) -> TrtllmBackend:
    release = installed_version(DISTRIBUTION)
    if release is None:
        raise PhiregError(
            "TensorRT-LLM is not installed, and an engine runs on nothing else",
            hint="pip install 'phireg[trtllm]' on a machine with a GPU (phireg doctor), or run the "
            "checkpoint that the engine was built from: --backend executor.",
        )
    rank, size = process_rank()
    ranks = communicator() if size > 1 else None
    try:
        runner = _load_runner(engine, release, rank)
    except BaseException:
        if ranks is not None:  # the others may wait for this one for ever
            atexit.register(ranks.Abort, 1)
        raise
    return TrtllmBackend(runner, engine, release, ranks)


class TrtllmBackend:
    """A loaded engine; see :class:`phireg.generation.backend.Backend`."""

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
        self._ranks = ranks  # None for one rank
        self._busy = False
        self._peak = 0

    def generate(self, request: Request) -> list[list[int]]:
        """Continue a batch."""
        check_request(self.description, request)
        arguments = self._arguments(request)
        with self._on_all_ranks(arguments):
            rows = _new_tokens(self._call(arguments), request)
        return [row[: _end(row, request.stop_ids)] for row in rows]

    def stream(self, request: Request) -> Iterator[list[int | None]]:
        """Continue a batch step by step.

        Rows may be ahead of others. A row that the runtime ended without giving its stop id gets
        the first of the stop ids.
        """
        check_request(self.description, request)
        stops = sorted(request.stop_ids)
        arguments = self._arguments(request) | {"streaming": True}
        rows: list[list[int]] = [[] for _ in request.prompts]
        with self._on_all_ranks(arguments):
            for output in self._steps(arguments):
                before, rows = rows, _new_tokens(output, request)
                rows = [row[: _end(row, stops) + 1] for row in rows]
                new = [row[len(old) :] for row, old in zip(rows, before, strict=True)]
                yield from map(list, zip_longest(*new))
        unfinished = [_end(row, stops) == len(row) < request.max_new_tokens for row in rows]
        if stops and any(unfinished):
            yield [stops[0] if row else None for row in unfinished]

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float] | None:
        """Return each continuation's mean of -ln p; None without ``--gather_context_logits``."""
        if not self.engine.gathers_logits:
            return None

        def logits_of(text: list[int]) -> torch.Tensor:
            # One token is generated because the runtime wants one; the input's logits count.
            arguments = self._arguments(Request([text], 1, (), Sampling()))
            with self._on_all_ranks(arguments):
                logits: torch.Tensor = self._call(arguments)["context_logits"][0]
            return logits[:, : self.engine.vocab_size]

        return mean_nll(self, prompts, continuations, logits_of)

    def peak_memory(self) -> int | None:
        """Return the most bytes in use on the GPU after a batch, with the KV cache."""
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
        rows = [torch.tensor(row, dtype=torch.int32) for row in request["batch_input_ids"]]
        with self._runtime():
            return self.runner.generate(**request | {"batch_input_ids": rows})

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
        with _quiet_stdout(), torch.no_grad():
            try:
                yield
            except Exception as error:  # which classes it raises is not documented
                raise PhiregError(f"TensorRT-LLM {self._release}: {error}") from None

    def _arguments(self, request: Request) -> dict[str, Any]:
        """Return the arguments of ``generate``, in plain values that can be sent to other ranks."""
        stops = sorted(request.stop_ids)
        settings = asdict(request.sampling)
        seed = settings.pop("seed")
        if request.sampling.greedy:
            settings = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}
        end = stops[0] if stops else -1
        arguments = settings | {
            "batch_input_ids": [list(prompt) for prompt in request.prompts],
            "max_new_tokens": request.max_new_tokens,
            "end_id": end,
            "pad_id": max(end, 0),
            "num_beams": request.num_beams,
            "random_seed": seed,
            "return_dict": True,
            "output_sequence_lengths": True,
        }
        # 0.11 takes one list for all rows. It goes on to the last token then; rows are cut.
        if len(stops) > 1 and public_version(self._release) >= Version("0.12.0.dev0"):
            arguments["stop_words_list"] = [[[stop] for stop in stops[1:]]] * len(request.prompts)
        if request.num_beams > 1:
            # As TensorRT-LLM's summarize.py searches with both models.
            arguments |= {"length_penalty": 1.0, "early_stopping": 1}
        return arguments


def _new_tokens(output: Output, request: Request) -> list[list[int]]:
    """Return the first beam's new tokens of every row."""
    ids, lengths = output["output_ids"][:, 0].tolist(), output["sequence_lengths"].tolist()
    return [
        row[len(prompt) : min(ends[0], len(prompt) + request.max_new_tokens)]
        for row, ends, prompt in zip(ids, lengths, request.prompts, strict=True)
    ]


def _end(row: Sequence[int], stops: Collection[int]) -> int:
    """Return the index of the first stop id, or the row's length."""
    return next((n for n, token in enumerate(row) if token in stops), len(row))


def _description(engine: Engine) -> Description:
    return Description(
        vocab_size=engine.vocab_size,
        positions=engine.max_seq_len,
        tp_size=engine.tp_size,
        processes=(engine.world_size,),
        start=f"mpirun -n {engine.world_size}",
        max_input=min(engine.max_input_len, engine.max_num_tokens or engine.max_input_len),
        # ModelRunner runs the prompts of a batch in one step.
        max_prompts=None if _in_flight_batching(engine) else engine.max_num_tokens,
        max_batch=engine.max_batch_size,
        max_beams=engine.max_beam_width,
        long_rope=None
        if engine.long_rope_switch is None
        # One choice for a batch in releases up to 0.16, and perhaps in later ones.
        else LongRope(engine.long_rope_switch, False, KEYS_STAY),
    )


def _load_runner(engine: Engine, release: str, rank: int) -> Runner:
    """Load this rank's part of an engine with the installed release."""
    # Errors only, as in TensorRT-LLM's scripts, unless the user has set it.
    os.environ.setdefault("TLLM_LOG_LEVEL", "ERROR")
    with _quiet_stdout():
        runner_class = _runner_class(release, _in_flight_batching(engine))
        try:
            return runner_class.from_dir(
                engine_dir=str(engine.directory), rank=rank, **engine.run_options
            )
        except Exception as error:  # which classes it raises is not documented
            other = f" (built by {engine.version})" if engine.version != release else ""
            raise CheckError(
                f"TensorRT-LLM {release} cannot load {engine.directory}{other}: "
                f"{type(error).__name__}: {error}",
                hint="an engine runs on the release and the kind of GPU that it was built with; "
                "build it again: phireg build CKPT --output-dir ENGINE",
            ) from None


def _runner_class(release: str, in_flight: bool) -> Any:
    runtime: Any = None
    try:
        runtime = import_module("tensorrt_llm.runtime")
    except Exception as error:  # a missing driver or library shows in any way
        if not isinstance(error, ModuleNotFoundError) or error.name != "tensorrt_llm.runtime":
            raise PhiregError(
                f"TensorRT-LLM {release} cannot be imported: {type(error).__name__}: {error}",
                hint="phireg doctor says what is missing.",
            ) from None
    for name in ("ModelRunnerCpp", "ModelRunner") if in_flight else ("ModelRunner",):
        if hasattr(runtime, name):
            return getattr(runtime, name)
    raise PhiregError(
        f"TensorRT-LLM {release} has no runtime for engines; {LAST} was the last with one",
        hint="pip install 'phireg[trtllm]' installs a release that has it.",
    )


def _in_flight_batching(engine: Engine) -> bool:
    """Return whether ModelRunnerCpp takes the engine.

    It needs the attention plugin, packed input and a paged KV cache; the last is an option of the
    plugins up to 0.13 and ``kv_cache_type`` of the build since.
    """
    plugins = engine.build_config.get("plugin_config")
    plugins = plugins if isinstance(plugins, Mapping) else {}
    cache = engine.build_config.get("kv_cache_type")
    paged = plugins.get("paged_kv_cache") if cache is None else str(cache).lower() == "paged"
    packed = plugins.get("remove_input_padding")
    return bool(plugins.get("gpt_attention_plugin") and packed and paged)


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send what the runtime prints, C++ included, to standard error: standard output is ours."""
    if sys.stdout is not None:
        sys.stdout.flush()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        try:
            stdout = os.dup(1)
        except OSError:
            pass  # closed: nothing can get there
        else:
            stack.callback(os.close, stdout)
            stack.callback(os.dup2, stdout, 1)
            os.dup2(2, 1)
        yield
