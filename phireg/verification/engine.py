"""Verify an engine that phireg built: its files, its network, and the engine running on its GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from phireg.checkpoint.manifest import check_files, read_manifest
from phireg.device import pick_device
from phireg.dtypes import ITEMSIZE
from phireg.errors import CheckError, EngineError, UsageError, check_known
from phireg.executor import Executor
from phireg.executor.model import free_memory
from phireg.executor.sources import open_ranks
from phireg.files.kinds import BUILD_FILE
from phireg.files.writing import BUILD_RECORD, write_file
from phireg.reader.tensors import rank_tensors
from phireg.tensorrt.build import checkpoint_record
from phireg.tensorrt.engine import NativeEngine, checkpoint_of, read_native
from phireg.tensorrt.inspection import file_problems
from phireg.tensorrt.network import build_network
from phireg.tensorrt.package import load_package
from phireg.tensorrt.plan import driver_version
from phireg.tensorrt.runtime import engine_device, prompt_logits
from phireg.tensorrt.session import Session
from phireg.verification import networks
from phireg.verification.logits import (
    ReferenceNotFiniteError,
    check_reference,
    overall,
    token_errors,
)
from phireg.verification.networks import PlaceError, compare_network
from phireg.verification.prompts import Prompts, choose_prompts, prompt_ids
from phireg.verification.result import (
    ENGINE_CHECKS,
    Outcome,
    Problem,
    Progress,
    Skipped,
    Verification,
    error_text,
    make_check,
)

_MEMORY_SHARE = 0.6
_FACTOR, _FLOOR = 4.0, 0.01
"""The logits of a running engine may be off by so many times what the executor's are in the same
dtype on the same GPU, and a little."""


def verify_engine(
    engine_dir: str | Path,
    checkpoint_dir: str | Path | None = None,
    *,
    checks: Collection[str] | None = None,
    device: str = "auto",
    max_tokens: int | None = None,
    progress: Progress = lambda check, more, total: None,
) -> Verification:
    """Verify an engine that phireg built, against the checkpoint that it was built from.

    Args:
        engine_dir: the engine.
        checkpoint_dir: the checkpoint; None is the one that the engine's manifest names.
        checks: names out of ``phireg.verification.result.ENGINE_CHECKS``; None is all, with
            ``device`` "cpu" all but ``running``.
        device: where the engine runs: "auto", "cuda" or "cuda:N"; "cpu" does not run it.
        max_tokens: most tokens of a prompt; None for what a stated budget allows.
        progress: takes (check, how much more is done, the total): prompts and steps.

    Returns:
        The checks. That of the running engine is written into the engine's manifest.

    Raises:
        UsageError: an unknown check or device.
        SourceError: the directory is not an engine, or there is no checkpoint.
        CheckError: engine and checkpoint do not fit together.
    """
    engine = read_native(engine_dir)
    named = None if checkpoint_dir is None else Path(checkpoint_dir)
    directory = checkpoint_of(engine, named, "--model-dir")
    names = tuple(ENGINE_CHECKS) if checks is None else tuple(checks)
    for name in names:
        check_known("check", name, ENGINE_CHECKS)
    if checks is None and device == "cpu":
        names = tuple(name for name in names if name != "running")
    if device != "auto":
        pick_device(device)  # an unknown one is an error before work
    verifier = _Verifier(engine, directory, device, max_tokens, progress)
    makers: dict[str, Callable[[], Outcome]] = {
        "files": verifier.files,
        "network": lambda: _compared(verifier.network),
        "running": lambda: _compared(verifier.running),
    }
    verification = Verification(
        checkpoint_dir=str(engine_dir),
        model_dir=str(directory),
        family=engine.spec.architecture.name,
        config=engine.config,
        checks=tuple(make_check(name, makers[name]) for name in ENGINE_CHECKS if name in names),
        provenance=tuple(verifier.provenance()),
        known=tuple(ENGINE_CHECKS),
    )
    if "running" in names and verification.check("running").verdict != "skipped":
        _record(engine, verification)
    return verification


def _compared(make: Callable[[], Outcome]) -> Outcome:
    """Make a check that compares with the executor, whose values may not be finite."""
    try:
        return make()
    except ReferenceNotFiniteError as error:
        return error.outcome(
            "the executor's own output",
            "a weight may be NaN or infinite, or float16 too narrow: phireg convert --dtype "
            "bfloat16, or phireg verify of the checkpoint, which says more.",
        )


class _Verifier:
    def __init__(
        self,
        engine: NativeEngine,
        checkpoint: Path,
        device: str,
        max_tokens: int | None,
        progress: Progress,
    ) -> None:
        self.engine, self.spec, self.checkpoint = engine, engine.spec, checkpoint
        self.device, self.progress = device, progress
        self.prompts = choose_prompts(engine.spec, max_tokens, gpu=False)
        self.lengths, beyond = _prompt_lengths(engine, self.prompts)
        self.undone = (*self.prompts.undone, *beyond)
        self.gpu: str | None = None
        self.driver = ""

    def files(self) -> Outcome:
        """Compare the files with the manifest."""
        problems = [Problem(name, text) for name, text in file_problems(self.engine, check=True)]
        count = self.spec.tp_size
        summary, notes = f"{count} engine file{'s'[: count > 1]}", []
        if self.engine.weights == "embedded":
            summary += " and the checkpoint"
            built = self.engine.manifest.get("checkpoint")
            recorded = built.get("files") if isinstance(built, dict) else None
            digests = checkpoint_record(self.checkpoint, self.spec.tp_size)["files"]
            problems += [
                Problem(name, f"in {self.checkpoint} is not what the engine was built from")
                for name, digest in digests.items()
                if not isinstance(recorded, dict) or recorded.get(name) != digest
            ]
            manifest = read_manifest(self.checkpoint)
            if manifest is None:
                notes.append("the checkpoint has no phireg.json: its headers alone were compared")
            else:
                problems += [
                    Problem("checkpoint", p) for p in check_files(self.checkpoint, manifest)
                ]
        return Outcome(summary, problems, notes)

    def network(self) -> Outcome:
        """Evaluate what TensorRT was given, once as it is and once in float32."""
        self._require_prompts()
        try:
            package = load_package(self.engine.backend)
        except EngineError as error:
            raise Skipped(error.message) from error
        dtypes = dict.fromkeys((self.spec.dtype, "float32"))
        undone = self.undone
        stored, free = rank_tensors(self.spec).values(), free_memory()
        constants = sum(math.prod(shape) * max(4, ITEMSIZE[code]) for code, shape in stored)
        needed = constants * self.spec.tp_size
        if self.spec.dtype != "float32" and needed > _MEMORY_SHARE * free:
            del dtypes["float32"]
            undone = (
                *undone,
                f"in float32, where a mistake shows best: that takes {needed / 1e9:.1f} GB of "
                f"memory, and {free / 1e9:.1f} GB are free",
            )
        total = len(dtypes) * networks.steps(self.lengths)
        self.progress("network", 0, total)
        sources = open_ranks(self.checkpoint, self.spec, range(self.spec.tp_size))
        errors: list[tuple[str, PlaceError]] = []
        largest: list[str] = []
        for dtype in dtypes:
            spec, read = networks.in_dtype(self.spec, sources, dtype)
            separate = self.engine.weights == "separate" and dtype == self.spec.dtype
            built = [
                build_network(
                    package,
                    spec,
                    None if separate else source,
                    rank=rank,
                    capacity=self.engine.limits.max_seq_len,
                )
                for rank, source in enumerate(read)
            ]
            exact, rounded = (
                Executor(self.spec, sources, range(self.spec.tp_size), dtype=name, offload=True)
                for name in ("float32", dtype)
            )
            results = compare_network(
                package.trt,
                built,
                read,
                exact,
                rounded,
                self.lengths,
                lambda more: self.progress("network", more, total),
            )
            errors += [(dtype, result) for result in results]
            largest.append(error_text(max(result.error for result in results)))
        return Outcome(
            f"prompts of {', '.join(map(str, self.lengths))} tokens and {networks.STEPS} more, in "
            f"{' and '.join(dtypes)}; relative error {' and '.join(largest)}",
            [result.problem(dtype) for dtype, result in errors if result.wrong],
            [
                "this is what TensorRT was told to compute, not what its kernels compute",
                *self.prompts.notes,
            ],
            undone,
            bool(self.prompts.notes),
        )

    def running(self) -> Outcome:
        """Run the engine and compare its logits with the executor's on the same GPU."""
        if self.spec.tp_size > 1:
            raise Skipped("phireg runs engines of one rank")
        self._require_prompts()
        try:
            device = engine_device(self.device)
        except UsageError as error:
            raise Skipped(
                f"{error.message}: run this on the machine of the engine's GPU; --device cpu "
                "leaves the check out"
            ) from error
        on_gpu = device.type == "cuda"
        self.gpu = torch.cuda.get_device_name(device) if on_gpu else str(device)
        self.driver = driver_version()
        weights = self.checkpoint if self.engine.weights == "separate" else None
        try:
            session = Session(self.engine, device, weights)
        except (EngineError, CheckError) as error:
            problem = Problem(self.engine.path(0).name, error.message, error.hint)
            return Outcome(f"the engine does not load on {self.gpu}", [problem], [])
        sources = open_ranks(self.checkpoint, self.spec, [0])
        rounded = Executor(self.spec, sources, [0], device=device)
        exact = Executor(self.spec, sources, [0], device=device, dtype="float32")
        total = len(self.lengths)
        self.progress("running", 0, total)
        errors = []
        for length in self.lengths:
            errors.append(compare_running(session, exact, rounded, length))
            self.progress("running", 1, total)
        session.close()
        problems = [
            Problem(
                f"prompt of {length} tokens, {phase}",
                f"the engine's logits are off by {error_text(error)}; the executor's rounding "
                f"explains {error_text(allowed)}",
                "do not use this engine; report the GPU, the driver and the engine's build log",
            )
            for length, results in zip(self.lengths, errors, strict=True)
            for phase, error, allowed in results
            if not error <= allowed
        ]
        largest = max(error for results in errors for _, error, _ in results)
        summary = f"on {self.gpu}; relative error of logits {error_text(largest)}"
        notes = list(self.prompts.notes)
        return Outcome(summary, problems, notes, self.undone, bool(notes))

    def _require_prompts(self) -> None:
        if not self.lengths:
            raise Skipped(
                f"no prompt with {networks.STEPS} tokens behind it fits into the "
                f"{self.engine.limits.max_seq_len} tokens that the engine takes"
            )

    def provenance(self) -> Iterator[tuple[str, str]]:
        yield "engine", str(self.engine.directory)
        yield "checkpoint", str(self.checkpoint)
        yield "built by", f"{self.engine.backend} {self.engine.version}"
        yield "for GPUs", ", ".join(self.engine.gpus) or "that of the builder"
        if self.gpu is not None:
            yield "run on", self.gpu
            yield "driver", self.driver
        yield "verified by", f"phireg {metadata.version('phireg')}"
        yield "date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def compare_running(
    session: Session, exact: Executor, rounded: Executor, length: int
) -> list[tuple[str, float, float]]:
    """Compare a running engine's logits with the executor's, of a prompt and of steps behind it.

    Return the name of each, its relative error, and what is allowed.
    """
    spec, total = session.spec, length + networks.STEPS
    ids = prompt_ids(spec.vocab_size, total)[0]
    expected, own = (model(ids[None].to(model.device))[0] for model in (exact, rounded))
    for logits in (expected, own):
        check_reference((None, "logits"), logits)
    prompt = prompt_logits(session, ids[:length].tolist(), total)
    long = total > spec.rope.original
    row = torch.zeros(1, dtype=torch.int32)
    steps = [
        session.feed([[int(ids[n])]], [n], [long], row, profile="generation")
        for n in range(length, total)
    ]
    actual = torch.cat([prompt, *steps])
    results = []
    for phase, tokens in (("the prompt", slice(length)), ("generation", slice(length, None))):
        error, rounding = (
            overall(token_errors(logits[tokens], expected[tokens])) for logits in (actual, own)
        )
        results.append((phase, error, _FACTOR * rounding + _FLOOR))
    return results


def _prompt_lengths(engine: NativeEngine, prompts: Prompts) -> tuple[list[int], list[str]]:
    """Return prompts that, with their steps, stay on one side of changes, and what none is past."""
    rope, capacity = engine.spec.rope, engine.limits.max_seq_len
    limit = capacity - networks.STEPS

    def fitted(tokens: int) -> int:
        crosses = rope.short is not None and tokens <= rope.original < tokens + networks.STEPS
        return rope.original - networks.STEPS if crosses else tokens

    lengths = {fitted(prompt.tokens) for prompt in prompts.prompts}
    lengths = {tokens for tokens in lengths if 0 < tokens <= limit} or {fitted(limit)}
    longest = max(lengths)
    beyond = [
        f"not compared: past {tokens} tokens {change}, and a prompt with {networks.STEPS} tokens "
        f"behind it does not fit into the engine's {capacity}"
        for tokens, change in prompts.thresholds
        if longest + networks.STEPS <= tokens < min(capacity, prompts.prompts[-1].tokens)
    ]
    return sorted(tokens for tokens in lengths if tokens > 0), beyond


def _record(engine: NativeEngine, verification: Verification) -> None:
    """Write what the running engine showed into the engine's manifest."""
    check = verification.check("running")
    record = {
        "verdict": check.verdict,
        "summary": check.summary,
        "problems": list(map(str, check.problems)),
        **dict(verification.provenance),
    }
    document = json.dumps({**engine.manifest, "verified": record}, indent=2) + "\n"
    write_file(engine.directory / BUILD_FILE, document.encode(), BUILD_RECORD)
