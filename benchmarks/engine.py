"""Engines of TensorRT for RTX at full size: what building them takes, beside what phireg estimates.

    python benchmarks/engine.py --family phi3-mini --directory /big/disk
    python benchmarks/engine.py --family phi3-small --formats fp8 int8_sq --weights separate

Writes a random model of the family's first published shape, makes a checkpoint of it in each
format, and builds an engine of that. Memory is that of the builder's process, without the pages of
mapped files, which the system takes back when it needs them. No GPU is needed. Needs three times
the model on disk, and for embedded weights as much memory as `phireg build --print-command` says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from phireg import registry
from phireg.testing import write_random_model

FORMATS = ("float16", "fp8", "int8_sq", "int8_wo", "int4_wo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="phi3-mini")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS[:3])
    parser.add_argument("--weights", choices=["embedded", "separate"], default="embedded")
    parser.add_argument("--gpu", default="sm89,sm120")
    parser.add_argument("--layers", type=int, help="fewer than published")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="phireg-engine-", dir=options.directory))
    try:
        run(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(work: Path, options: argparse.Namespace) -> None:
    family = registry.load(options.family).family
    config = dict(family.published[0].config)
    if options.layers:
        config["num_hidden_layers"] = options.layers
    write_random_model(family, config, work / "source")
    (work / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(100, 116))}))
    print(f"{options.family}, {options.weights} weights, {os.cpu_count()} cores", flush=True)
    for form in options.formats:
        checkpoint = work / form
        phireg(*checkpoint_command(work, form), "--output-dir", checkpoint, "--quiet")
        size = (checkpoint / "rank0.safetensors").stat().st_size
        arguments = (
            "build", checkpoint, "--output-dir", work / "engine", "--backend", "tensorrt-rtx",
            "--gpu", options.gpu, "--weights", options.weights, "--overwrite", "--json",
        )  # fmt: skip
        planned = json.loads(phireg(*arguments, "--print-command")[0])["estimate"]
        load = os.getloadavg()[0]
        text, peak = phireg(*arguments, "--quiet")
        built = json.loads(text)
        (rank,) = built["ranks"]
        print(
            f"  {form:8} checkpoint {size / 1e9:6.2f} GB, engine {rank['bytes'] / 1e9:6.3f} GB "
            f"(said {planned['engine_bytes'] / 1e9:.3f}), memory {peak / 1e9:5.2f} GB "
            f"(said {planned['memory_bytes'] / 1e9:.2f}), CPU {rank['cpu_seconds']:.0f} s "
            f"(said {planned['cpu_seconds']:.0f}), wall {built['seconds']:.0f} s at load "
            f"{load:.0f}",
            flush=True,
        )
        shutil.rmtree(work / "engine")
        shutil.rmtree(checkpoint)


def checkpoint_command(work: Path, form: str) -> list[Any]:
    """The command that makes a checkpoint; one short sample calibrates it."""
    model = ["--model-dir", work / "source", "--dtype", "float16"]
    if form == "float16":
        return ["convert", *model]
    command = ["quantize", *model, "--qformat", form, "--no-measure"]
    if form.endswith("_wo"):
        return command
    samples = ["--calib-file", work / "ids.jsonl", "--calib-size", 1, "--device", "cpu"]
    return [*command, *samples, "--calib-stats", work / "statistics.safetensors"]


def phireg(*arguments: Any) -> tuple[str, int]:
    """Run a command; return what it prints, and the most memory of it and its children."""
    command = [sys.executable, "-m", "phireg", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.2)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(
                f"{' '.join(command)} ended with {process.returncode}\n{out.read()}{err.read()}"
            )
        return out.read(), peak


def anonymous_memory(pid: int) -> int:
    """Resident bytes of a process and its children that are no pages of files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return 0  # it has ended
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    own = int(lines[0].split()[1]) * 1024 if lines else 0
    return own + sum(anonymous_memory(int(child)) for child in children)


if __name__ == "__main__":
    main()
