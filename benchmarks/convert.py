"""Conversion against its floor: `cp` and fsync of the same bytes.

    python benchmarks/convert.py                 # Phi-3-mini, 7.6 GB
    python benchmarks/convert.py --layers 4      # the same widths, fewer layers
    python benchmarks/convert.py --casts-from float32  # its casts alone
    python benchmarks/convert.py --json

Makes a random checkpoint of a published shape, then runs every contender, several rounds in another
order each, as a process of its own, with the page cache written back before it starts. Needs about
four times the model's size on disk. The source is read from the page cache where it fits, by all.

Free memory is written to before every run: in a virtual machine what the last run freed may have
gone back to the host, and the next one's writes would wait for it, those of large blocks longest.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")

LOAD_EVERYTHING = """
import os, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
state, out = model.state_dict(), {}
for name, tensor in state.items():
    if "gate_up_proj" in name:
        gate, up = tensor.chunk(2)
        tensor = torch.cat([up, gate])
    for old, new in (("model.embed_tokens", "transformer.vocab_embedding"),
                     ("model.norm", "transformer.ln_f"), ("model.layers", "transformer.layers"),
                     ("self_attn.qkv_proj", "attention.qkv"),
                     ("self_attn.o_proj", "attention.dense"),
                     ("post_attention_layernorm", "post_layernorm"),
                     ("mlp.gate_up_proj", "mlp.fc"), ("mlp.down_proj", "mlp.proj")):
        name = name.replace(old, new)
    out[name] = tensor.contiguous()
os.mkdir(target)
save_file(out, target + "/rank0.safetensors")
fd = os.open(target + "/rank0.safetensors", os.O_RDONLY)
os.fsync(fd)
"""

COPY = """
import os, subprocess, sys
source, target = sys.argv[1:]
subprocess.run(["cp", "-r", source, target], check=True)
for name in os.listdir(target):
    fd = os.open(os.path.join(target, name), os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
"""


@dataclass
class Contender:
    """One way to get the bytes to the other place, and its measurements."""

    name: str
    command: list[str]
    source: Path
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    written: int = 0  # bytes


def settle(source: Path, size: int) -> None:
    """Give every run the same start: free memory at hand, the source in the page cache."""
    os.sync()
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemFree:")
    )
    if (length := min(free * 9 // 10, 2 * size)) > 0:
        with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            for start in range(0, length, mmap.PAGESIZE):
                memory[start] = 1
    buffer = memoryview(bytearray(2**24))
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds, and peak resident MB of the process (VmHWM, polled while it runs).

    The operating system's account of a finished child (ru_maxrss) would not do: it begins with what
    its parent held when it was started.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0.0
    while True:
        try:
            _, errors = process.communicate(timeout=0.02)
            break
        except subprocess.TimeoutExpired:
            peak = max(peak, high_water_mark(process.pid))
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{errors.decode()}")
    return seconds, peak


def high_water_mark(pid: int) -> float:
    """MB, or 0 once the process has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="fewer layers than the published model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument(
        "--casts-from", choices=DTYPES, help="a source in this dtype, and its casts alone"
    )
    parser.add_argument("--skip-load-everything", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    work = Path(tempfile.mkdtemp(prefix="phireg-benchmark-", dir=options.directory))
    try:
        results = run(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    from phireg import registry
    from phireg.testing import write_random_model

    family = registry.load("phi3-mini").family
    config = dict(family.published[0].config)
    if options.layers:
        config["num_hidden_layers"] = options.layers
    source = work / "source"
    write_random_model(family, config, source)
    dtype = options.casts_from or "bfloat16"
    if dtype != "bfloat16":
        cast = [sys.executable, "-m", "phireg", "convert", "--target", "hf", "--dtype", dtype]
        cast += ["--model-dir", str(source), "--output-dir", str(work / dtype), "--quiet"]
        subprocess.run(cast, check=True, stdout=subprocess.DEVNULL)
        source = work / dtype
    size = size_of(source)

    phireg = [sys.executable, "-m", "phireg", "convert", "--model-dir", str(source), "--quiet"]
    phireg += ["--output-dir", "{out}"]
    copy = [sys.executable, "-c", COPY]
    contenders = [
        Contender("cp + fsync", [*copy, str(source), "{out}"], source),
        Contender("phireg, TP 1", phireg, source),
        Contender("phireg, TP 2", [*phireg, "--tp-size", "2"], source),
        Contender("phireg, TP 8", [*phireg, "--tp-size", "8"], source),
        Contender("phireg, to float16", [*phireg, "--dtype", "float16"], source),
    ]
    if options.casts_from:
        casts = [
            Contender(f"{dtype} to {other}", [*phireg, "--dtype", other], source)
            for other in DTYPES
            if other != dtype
        ]
        contenders = [contenders[0], *casts]
        if dtype == "float32":  # of what its casts write
            of_16_bits = work / "source"
            command = [*copy, str(of_16_bits), "{out}"]
            contenders.append(Contender("cp + fsync, 16 bits", command, of_16_bits))
    elif not options.skip_load_everything:
        command = [sys.executable, "-c", LOAD_EVERYTHING, str(source), "{out}"]
        contenders.append(Contender("load everything", command, source))
    out = work / "out"
    for number in range(options.rounds):
        # What ran before changes what the disk is busy with.
        for contender in random.Random(number).sample(contenders, len(contenders)):
            command = [part.replace("{out}", str(out)) for part in contender.command]
            settle(contender.source, size_of(contender.source))
            seconds, peak = measured(command)
            contender.seconds.append(seconds)
            contender.peak_mb.append(peak)
            contender.written = size_of(out)
            shutil.rmtree(out)
    small = {
        "phireg --help": [sys.executable, "-m", "phireg", "--help"],
        "phireg plan": [*phireg[:3], "plan", "--model-dir", str(source)],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    floor = contenders[0].seconds
    return {
        "model_bytes": size,
        "rounds": options.rounds,
        "contenders": {
            c.name: {
                "seconds": statistics.median(c.seconds),
                "ratio": statistics.median(a / b for a, b in zip(c.seconds, floor, strict=True)),
                "ratios": [a / b for a, b in zip(c.seconds, floor, strict=True)],
                "written_bytes": c.written,
                # cp of as many bytes: at TP 8 every rank has the embedding
                "ratio_to_written": statistics.median(
                    a / b * size / c.written for a, b in zip(c.seconds, floor, strict=True)
                ),
                "peak_mb": max(c.peak_mb),
            }
            for c in contenders
        },
        "commands": {name: median_of(command, 5) for name, command in small.items()},
    }


def size_of(directory: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in directory.iterdir())


def median_of(command: list[str], times: int) -> dict[str, float]:
    """Median seconds and peak MB of a short command."""
    seconds, peaks = zip(*(measured(command) for _ in range(times)), strict=True)
    return {"seconds": statistics.median(seconds), "peak_mb": statistics.median(peaks)}


def show(results: dict[str, Any]) -> None:
    print(f"{results['model_bytes'] / 1e9:.2f} GB, {results['rounds']} rounds; medians")
    print(
        f"{'':20} {'seconds':>8} {'x cp+fsync':>11} {'(range)':>14} {'of bytes written':>17} "
        f"{'written GB':>11} {'peak MB':>8}"
    )
    for name, c in results["contenders"].items():
        spread = f"{min(c['ratios']):.2f} - {max(c['ratios']):.2f}"
        print(
            f"{name:20} {c['seconds']:8.2f} {c['ratio']:11.2f} {spread:>14} "
            f"{c['ratio_to_written']:17.2f} {c['written_bytes'] / 1e9:11.2f} {c['peak_mb']:8.0f}"
        )
    for name, c in results["commands"].items():
        print(f"{name:20} {c['seconds']:8.2f} {'':56} {c['peak_mb']:8.0f}")


if __name__ == "__main__":
    main()
