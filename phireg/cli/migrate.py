"""``phireg migrate``: from a TensorRT-LLM checkpoint to a Hugging Face directory."""

from __future__ import annotations

import time
from typing import Any

import phireg
from phireg.cli.convert import run_after
from phireg.cli.errors import interruptible
from phireg.cli.help import documented
from phireg.cli.options import (
    checkpoint_argument,
    family_option,
    json_option,
    model_dir_option,
    output_dir_option,
    overwrite_option,
    quiet_option,
    revision_option,
    shard_option,
    target_option,
)
from phireg.cli.output import ProgressBars, columns, emit, emit_json, next_steps
from phireg.files.sizes import size


@documented(
    "phireg migrate ckpt --model-dir ./Phi-3-mini-4k-instruct --output-dir phi3-fp8",
    "phireg migrate ckpt --model-dir microsoft/phi-2 --output-dir phi2",
    waits="reading the checkpoint",
)
@checkpoint_argument("checkpoint_dir", "CKPT")
@model_dir_option("The model it was made from: its config.json and tokenizer.", required=True)
@output_dir_option("directory")
@target_option("auto")
@shard_option
@family_option
@revision_option
@overwrite_option("directory")
@quiet_option()
@json_option
def command(
    checkpoint_dir: str,
    model_dir: str,
    output_dir: str,
    *,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a TensorRT-LLM checkpoint as the directory that today's runtimes read.

    Quantized values and scales are carried over bit for bit, from any number of ranks.
    """
    from phireg.checkpoint.manifest import read_manifest

    started = time.monotonic()
    with interruptible(output_dir), ProgressBars(quiet) as bars:
        result = phireg.migrate(
            checkpoint_dir,
            model_dir,
            output_dir,
            progress=bars.bytes("migrating", "flushing to disk"),
            **options,
        )
    seconds = time.monotonic() - started
    target = (read_manifest(result.output_dir) or {})["options"]["target"]
    if as_json:
        document = {
            "checkpoint_dir": checkpoint_dir,
            "output_dir": str(result.output_dir),
            "target": target,
            "files": dict(result.files),
            "seconds": round(seconds, 3),
        }
        emit_json(document)
    elif not quiet:
        total = size(sum(result.files.values()))
        rows = [
            ("wrote", f"{total} to {result.output_dir} (--target {target})"),
            ("files", ", ".join(result.files)),
            ("time", f"{seconds:.1f} s"),
        ]
        verify = ["phireg", "verify", str(result.output_dir), "--model-dir", model_dir]
        following = next_steps(verify, *run_after(result.output_dir))
        emit("\n".join((columns(rows), following)))
