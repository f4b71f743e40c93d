"""Published shapes at full size: converted, verified on a GPU, and TP 2 over NCCL against TP 1.

    python benchmarks/full_size.py --family phi3-small --directory /big/disk
    python benchmarks/full_size.py --family phi3-medium --dtype bfloat16
    python benchmarks/full_size.py --family phi3-medium --device cpu

Writes a random model of the family's first published shape, converts it for one rank and for two,
verifies the first against the source model's own code (all checks) and the second by its bytes,
then runs the two ranks in two processes over NCCL and compares their logits with those of the
one-rank checkpoint. Needs two GPUs (--gpus 1 leaves the last step out) and three times the model
on disk.

With --device cpu it shows what a machine smaller than the model can do: it verifies the one-rank
checkpoint with the prompts that verify chooses, and prints how much memory that took besides the
pages of mapped files. Needs twice the model on disk.
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

import torch

from phireg import registry
from phireg.executor import load
from phireg.testing import write_random_model

TOKENS = 1603
"""Past the 1024 tokens below which Phi-3-small's block-sparse layers are plain causal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="phi3-small")
    parser.add_argument("--layers", type=int, help="fewer than published")
    parser.add_argument("--dtype", default="float32", help="compute dtype of the checks")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="phireg-full-size-", dir=options.directory))
    try:
        run(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(work: Path, options: argparse.Namespace) -> None:
    family = registry.load(options.family).family
    config = dict(family.published[0].config)
    if options.layers:
        config["num_hidden_layers"] = options.layers
    source = work / "source"
    with timed("random model"):
        write_random_model(family, config, source)
    size = sum(file.stat().st_size for file in source.iterdir())
    cpu = options.device == "cpu"
    where = f"{os.cpu_count()} cores" if cpu else torch.cuda.get_device_name()
    print(f"{options.family}, {size / 1e9:.1f} GB, {where}", flush=True)
    for ranks in (1,) if cpu else (1, 2):
        with timed(f"convert, TP {ranks}"):
            phireg(
                "convert", "--model-dir", source, "--output-dir", work / f"tp{ranks}",
                "--tp-size", ranks, "--quiet",
            )  # fmt: skip
    if cpu:
        with timed(f"verify TP 1, logits in {options.dtype}"):
            verify(work / "tp1", source, "--dtype", options.dtype)
        return
    with timed("verify TP 2, bytes"):
        verify(work / "tp2", source, "--quick")
    with timed(f"verify TP 1, logits in {options.dtype}"):
        verify(
            work / "tp1", source, "--device", "cuda", "--dtype", options.dtype,
            "--max-tokens", TOKENS,
        )  # fmt: skip
    ids = torch.randint(0, config["vocab_size"], (1, TOKENS), generator=torch.manual_seed(0))
    with timed("logits, TP 1"):
        wanted = load(work / "tp1", device="cuda", dtype=options.dtype)(ids.cuda()).cpu()
    torch.cuda.empty_cache()
    if options.gpus == 2:
        with timed("logits, TP 2 over NCCL"):
            torch.multiprocessing.spawn(one_rank, (work, ids, options.dtype), nprocs=2)
        got = torch.load(work / "logits.pt", weights_only=True)
        error = float((got - wanted).norm() / wanted.norm())
        same = float((got.argmax(-1) == wanted.argmax(-1)).float().mean())
        print(f"TP 2 against TP 1: relative error {error:.1e}, top-1 equal {same:.2%}", flush=True)


def one_rank(rank: int, work: Path, ids: torch.Tensor, dtype: str) -> None:
    """What each of the two processes does."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{work}/rendezvous", rank=rank, world_size=2
    )
    model = load(work / "tp2", device=f"cuda:{rank}", dtype=dtype, distributed=True)
    logits = model(ids.to(f"cuda:{rank}"))
    if rank == 0:
        torch.save(logits.cpu(), work / "logits.pt")
    torch.distributed.destroy_process_group()


def phireg(*arguments: Any) -> str:
    command = [sys.executable, "-m", "phireg", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.1)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(
                f"{' '.join(command)} ended with {process.returncode}\n{out.read()}{err.read()}"
            )
        print(f"    {peak / 1e9:.2f} GB of memory at most, mapped files apart", flush=True)
        return out.read()


def anonymous_memory(pid: int) -> int:
    """Resident bytes of a process that are no pages of files, or 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def verify(checkpoint: Path, source: Path, *arguments: Any) -> None:
    """Run ``phireg verify`` and print a line for every check."""
    found = phireg("verify", checkpoint, "--model-dir", source, "--json", "--quiet", *arguments)
    for check in json.loads(found)["checks"]:
        print(f"    {check['name']:10} {check['verdict']:8} {check.get('summary', '')}", flush=True)


class timed:  # noqa: N801 - reads as a statement
    """Print how long a block took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        print(f"  {self.what}: {time.perf_counter() - self.start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
