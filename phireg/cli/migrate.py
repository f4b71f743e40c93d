"""``phireg migrate``: from a TensorRT-LLM checkpoint to a Hugging Face directory."""

from __future__ import annotations

import time
from typing import Any

import phireg
from phireg.cli import options
from phireg.cli.convert import run_after
from phireg.cli.errors import interruptible
from phireg.cli.help import documented
from phireg.cli.output import ProgressBars, columns, emit, emit_json, next_steps
from phireg.files.sizes import size


@documented(
    "phireg migrate ckpt --model-dir ./Phi-3-mini-4k-instruct --output-dir phi3-fp8",
    "phireg migrate ckpt --model-dir microsoft/phi-2 --output-dir phi2",
    waits="reading the checkpoint",
)
@options.checkpoint_argument("checkpoint_dir", "CKPT")
@options.model_dir_option(
    "The model it was made from: its config.json and tokenizer.", required=True
)
@options.output_dir_option("directory")
@options.target_option("auto")
@options.shard_option
@options.family_option
@options.revision_option
@options.overwrite_option("directory")
@options.quiet_option()
@options.json_option
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
