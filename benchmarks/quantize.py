"""Calibrating and quantizing a full-size random Phi-3-mini, beside NVIDIA ModelOpt.

    python benchmarks/quantize.py --directory /big/disk [--layers N] [--samples 512] [--json FILE]

Writes a random bfloat16 model of the published shape and as many samples of as many random tokens
as asked for. Then, for FP8 and INT8 SmoothQuant (or the ``--formats`` asked for) in turn and in
processes of their own, phireg calibrates and quantizes it to a checkpoint with FP8 KV scales, and
nvidia-modelopt, where it is installed, loads it in transformers, quantizes it on the same tokens
and writes its unified checkpoint, without KV scales, which would take it longer. Each process
reports the seconds of its parts, imports apart; ``all`` is from the beginning of the process.
Memory is what is resident at most, with and without mapped files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32064,
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-5, "sliding_window": 2047,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 32000, "pad_token_id": 32000,
}  # fmt: skip
FORMATS = ("fp8", "int8_sq", "int4_awq", "nvfp4")


def write_model(work: Path, options: argparse.Namespace) -> None:
    import numpy as np

    from phireg import registry
    from phireg.testing import write_random_model

    config = {**CONFIG, "num_hidden_layers": options.layers}
    write_random_model(registry.load("phi3-mini").family, config, work / "model")
    rows = np.random.default_rng(0).integers(0, 32000, (options.samples, options.tokens))
    lines = (json.dumps({"input_ids": row}) for row in rows.tolist())
    (work / "samples.jsonl").write_text("\n".join(lines) + "\n")


Figures = Iterator[tuple[str, float]]


def phireg(work: Path, options: argparse.Namespace) -> Figures:
    from transformers import Phi3ForCausalLM

    import phireg
    import phireg.calibration.calibrate
    import phireg.conversion.quantize
    from phireg.calibration.settings import Settings

    del Phi3ForCausalLM  # imported lazily
    yield "imports", options.clock()
    settings = Settings(
        file=work / "samples.jsonl", size=options.samples, max_length=options.tokens,
        device=options.device,
    )  # fmt: skip
    last: dict[str, float] = {}

    def progress(stage: str, _: int, __: int) -> None:
        last[stage] = time.perf_counter()

    start = time.perf_counter()
    out = work / f"phireg-{options.format}"
    plan = phireg.plan(
        work / "model", family="phi3-mini", qformat=options.format, kv_cache_dtype="fp8"
    )
    converted = phireg.quantize(plan, out, settings=settings, progress=progress)
    last["flushing"] = time.perf_counter()
    seconds = last["flushing"] - start
    for stage in ("preparing", "calibrating", "scales", "writing", "flushing"):
        yield stage, last[stage] - start
        start = last[stage]
    yield "seconds", seconds
    yield "gigabytes", sum(converted.files.values()) / 1e9
    shutil.rmtree(out)
    converted.calibrated.file.unlink()


def modelopt(work: Path, options: argparse.Namespace) -> Figures:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, Phi3ForCausalLM

    del Phi3ForCausalLM  # imported lazily
    yield "imports", options.clock()
    start = begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.bfloat16)
    model = model.to(options.device).eval()
    yield "loading", time.perf_counter() - start
    rows = [json.loads(line)["input_ids"] for line in (work / "samples.jsonl").open()]
    batches = torch.tensor(rows, device=options.device).split(options.batch_size)

    def forward(calibrated: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                calibrated(batch, use_cache=False)

    config = {
        "fp8": mtq.FP8_DEFAULT_CFG, "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
        "int4_awq": mtq.INT4_AWQ_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    }[options.format]  # fmt: skip
    start = time.perf_counter()
    model = mtq.quantize(model, config, forward)
    yield "calibrating", time.perf_counter() - start
    start = time.perf_counter()
    export_hf_checkpoint(model, export_dir=work / "modelopt")
    yield "exporting", time.perf_counter() - start
    yield "seconds", time.perf_counter() - begun
    shutil.rmtree(work / "modelopt")


STEPS: dict[str, Callable[[Path, argparse.Namespace], Figures]] = {
    "phireg": phireg,
    "modelopt": modelopt,
}


class Memory(threading.Thread):
    """Samples the memory of this process: its peaks in MB, resident and without mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"VmHWM": 0.0, "RssAnon": 0.0}

    def run(self) -> None:
        """Take samples until the process ends."""
        while True:
            self.sample()
            time.sleep(0.02)

    def sample(self) -> dict[str, float]:
        """Take a sample, and return the peaks."""
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.peaks:
                self.peaks[name] = max(self.peaks[name], int(value.split()[0]) / 1000)
        return {"resident_mb": self.peaks["VmHWM"], "anonymous_mb": self.peaks["RssAnon"]}


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32, help="ModelOpt's; phireg chooses")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS[:2])
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        options.clock = lambda: time.perf_counter() - start
        memory = Memory()
        memory.start()
        figures = dict(STEPS[options.step](options.directory, options))
        print(json.dumps({**figures, "all": options.clock(), **memory.sample()}))
        return
    results = {}
    with working_directory(options.directory) as work:
        write_model(work, options)
        size = sum(file.stat().st_size for file in (work / "model").iterdir())
        print(f"random Phi-3-mini, {options.layers} layers, {size / 1e9:.2f} GB; ", end="")
        print(f"{options.samples} samples of {options.tokens} tokens", flush=True)
        for form in options.formats:
            for step in STEPS:
                results[f"{step} {form}"] = in_process(work, step, form)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


@contextmanager
def working_directory(below: Path | None) -> Iterator[Path]:
    """A temporary directory, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="phireg-quantize-", dir=below) as work:
        yield Path(work)


def in_process(work: Path, step: str, form: str) -> dict[str, float] | None:
    """Run a step in a fresh interpreter and show its figures; None if it fails."""
    arguments = [*sys.argv[1:], "--directory", str(work), "--step", step, "--format", form]
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        print(f"{step} {form}: failed\n{ran.stderr[-2000:]}", flush=True)
        return None
    figures: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    print(f"{step} {form}: {shown}", flush=True)
    return figures


if __name__ == "__main__":
    main()
