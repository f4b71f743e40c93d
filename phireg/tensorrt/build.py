"""Build a native engine in a process of its own, which nothing outlives."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from phireg.checkpoint.manifest import file_record, read_manifest
from phireg.checkpoint.rankfiles import RankFiles
from phireg.errors import EngineError
from phireg.files.json import encode_object
from phireg.files.kinds import BUILD_FILE, ENGINE, MANIFEST, file_sizes, producer, tokenizer_files
from phireg.files.output import OutputDirectory
from phireg.files.writing import copy_file, new_log
from phireg.tensorrt.engine import NativeEngine, read_native, write_config
from phireg.tensorrt.job import MARK, Job, command, record_path
from phireg.tensorrt.plan import EnginePlan
from phireg.trtllm.builder import run_builder

Progress = Callable[[Mapping[str, Any]], None]
"""Called with rank, phase and, within a phase, the steps done and their number."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A built engine."""

    engine: NativeEngine
    files: Mapping[str, int]  # every file: bytes
    ranks: tuple[Mapping[str, Any], ...]  # what the manifest says of each rank's engine
    log: Path  # the builder's output
    seconds: float


def build_engine(
    plan: EnginePlan, *, overwrite: bool = False, progress: Progress | None = None
) -> BuiltEngine:
    """Carry out a plan; the arguments are :func:`phireg.build`'s."""
    started = time.monotonic()
    needed = plan.estimate.engine_bytes * plan.spec.tp_size
    output = OutputDirectory(
        plan.output_dir, overwrite=overwrite, required_bytes=needed, kind=ENGINE
    )
    with output as directory:
        records = _compile(plan, directory, progress)
        write_config(
            directory, plan.backend, plan.package.version, plan.gpus, plan.weights, plan.limits,
            plan.config,
        )  # fmt: skip
        for file in tokenizer_files(plan.source):
            copy_file(file, directory)
        (directory / BUILD_FILE).write_bytes(encode_object(_manifest(plan, records)))
        files = file_sizes(directory)
    seconds = time.monotonic() - started
    return BuiltEngine(read_native(plan.output_dir), files, tuple(records), plan.log, seconds)


def _compile(plan: EnginePlan, directory: Path, progress: Progress | None) -> list[dict[str, Any]]:
    """Run the compiler; return its records of the ranks."""
    job = Job(
        backend=plan.backend,
        config=dict(plan.config),
        checkpoint=str(plan.source.resolve()) if plan.checkpoint else None,
        output=str(directory.resolve()),
        gpus=plan.gpus if plan.package.capabilities else (),
        weights=plan.weights,
        limits=plan.limits,
        workers=plan.options.workers or 1,
    )

    def listen(line: str) -> None:
        if progress is None or not line.startswith(MARK):
            return
        try:
            event = json.loads(line.removeprefix(MARK))
        except ValueError:  # torn by what a library printed to standard error
            return
        progress(event)

    with tempfile.TemporaryDirectory() as scratch, new_log(plan.log) as log:
        path = Path(scratch, "job.json")
        path.write_text(json.dumps(asdict(job)), encoding="utf-8")
        log.write(f"{plan.package.name}\n".encode())
        exit_code, last_lines = run_builder(command(path), log, listen, Path(scratch))
        records = [
            json.loads(record.read_text(encoding="utf-8"))
            for rank in range(plan.spec.tp_size)
            if (record := record_path(path, rank)).exists()
        ]
    for record in records:
        if "error" in record:
            hint = f"the builder's whole output is in {plan.log}; {record['hint']}"
            raise EngineError(f"{record['error']}; no engine was written", hint=hint)
    if exit_code or len(records) < plan.spec.tp_size:
        ending = f"with {exit_code}" if exit_code >= 0 else f"by signal {-exit_code}"
        raise EngineError(
            f"{plan.package.name} ended {ending}; no engine was written"
            + "".join(f"\n  {text}" for text in last_lines[-3:]),
            hint=_advice(plan, exit_code),
        )
    return records


def _advice(plan: EnginePlan, exit_code: int) -> str:
    log = f"its whole output is in {plan.log}"
    if exit_code != -signal.SIGKILL:
        return f"{log}."
    needs = f"memory ran out, it seems: about {plan.estimate.memory_bytes / 1e9:.1f} GB are needed"
    other = "" if plan.weights == "separate" else "; --weights separate needs little"
    return f"{needs}{other}; {log}."


def _manifest(plan: EnginePlan, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "producer": producer(),
        "backend": plan.backend,
        "version": plan.package.version,
        "gpus": list(plan.gpus),
        "weights": plan.weights,
        "checkpoint": (
            checkpoint_record(plan.source, plan.spec.tp_size) if plan.checkpoint else None
        ),
        "options": asdict(plan.options),
        "notes": list(plan.notes),
        "ranks": list(records),
        "verified": None,  # what phireg verify saw of it on a GPU
    }


def checkpoint_record(checkpoint_dir: Path, tp_size: int) -> dict[str, Any]:
    """Return where a checkpoint is, and digests that tell it from others."""
    manifest = read_manifest(checkpoint_dir)
    digests = {}
    with RankFiles(checkpoint_dir, tp_size) as files:
        for file in files.values():
            record = (manifest or {"files": {}})["files"].get(file.path.name) or {}
            tensors = json.dumps(record.get("tensors"), sort_keys=True).encode()
            digests[file.path.name] = {
                "header": file.header.digest,
                # Of the digests of all tensors; without phireg.json there are none.
                "tensors": xxhash.xxh3_128(tensors).hexdigest() if record.get("tensors") else None,
            }
    return {
        "directory": str(checkpoint_dir.resolve()),
        "manifest": file_record(checkpoint_dir / MANIFEST) if manifest is not None else None,
        "files": digests,
    }
