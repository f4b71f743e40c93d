"""Calibrating and quantizing a full-size random Phi-3-mini, beside NVIDIA ModelOpt.

    python benchmarks/quantize.py --directory /big/disk [--layers N] [--samples 512] [--json FILE]

Writes a random bfloat16 model of the published shape and as many samples of as many random tokens
as asked for, then in processes of their own: calibrates, exports FP8 and INT8 SmoothQuant from
those statistics, and, where nvidia-modelopt is installed, lets it quantize the model in
transformers on the same tokens and write its unified checkpoint. Each process reports its time
without imports and its largest resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
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
FORMATS = ("fp8", "int8_sq")


def write_model(work: Path, options: argparse.Namespace) -> None:
    import numpy as np

    from phireg import registry
    from phireg.testing import write_random_model

    config = {**CONFIG, "num_hidden_layers": options.layers}
    write_random_model(registry.load("phi3-mini").family, config, work / "model")
    rows = np.random.default_rng(0).integers(0, 32000, (options.samples, options.tokens))
    lines = (json.dumps({"input_ids": row}) for row in rows.tolist())
    (work / "samples.jsonl").write_text("\n".join(lines) + "\n")


def calibrate(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    import phireg
    from phireg.calibration.settings import Settings

    plan = phireg.plan(work / "model", family="phi3-mini")
    settings = Settings(
        file=work / "samples.jsonl", size=options.samples, max_length=options.tokens,
        batch_size=options.batch_size, device=options.device,
    )  # fmt: skip
    start = time.perf_counter()
    phireg.calibrate(plan, work / "calibration.safetensors", settings)
    yield "seconds", time.perf_counter() - start


def export(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    import phireg

    start = time.perf_counter()
    plan = phireg.plan(
        work / "model", family="phi3-mini", qformat=options.format, kv_cache_dtype="fp8"
    )
    converted = phireg.quantize(plan, work / options.format, work / "calibration.safetensors")
    yield "seconds", time.perf_counter() - start
    yield "gigabytes", sum(converted.files.values()) / 1e9
    shutil.rmtree(work / options.format)


def modelopt(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.bfloat16)
    model = model.to(options.device).eval()
    yield "load_seconds", time.perf_counter() - start
    rows = [json.loads(line)["input_ids"] for line in (work / "samples.jsonl").open()]
    ids = torch.tensor(rows, device=options.device)
    batches = ids.split(options.batch_size)

    def forward(calibrated: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                calibrated(batch, use_cache=False)

    config = mtq.FP8_DEFAULT_CFG if options.format == "fp8" else mtq.INT8_SMOOTHQUANT_CFG
    start = time.perf_counter()
    model = mtq.quantize(model, config, forward)
    yield "calibrate_seconds", time.perf_counter() - start
    start = time.perf_counter()
    export_hf_checkpoint(model, export_dir=work / "modelopt")
    yield "export_seconds", time.perf_counter() - start
    shutil.rmtree(work / "modelopt")


STEPS: dict[str, Callable[[Path, argparse.Namespace], Iterator[tuple[str, float]]]] = {
    "calibrate": calibrate, "export": export, "modelopt": modelopt
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        figures = dict(STEPS[options.step](options.directory, options))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**figures, "peak_resident_mb": peak}))
        return
    with working_directory(options.directory) as work:
        write_model(work, options)
        size = sum(file.stat().st_size for file in (work / "model").iterdir())
        print(f"random Phi-3-mini, {options.layers} layers, {size / 1e9:.2f} GB; ", end="")
        print(f"{options.samples} samples of {options.tokens} tokens, batch {options.batch_size}")
        results = {"calibrate": in_process(work, "calibrate", None)}
        for form in FORMATS:
            results[f"export {form}"] = in_process(work, "export", form)
        for form in FORMATS:
            results[f"modelopt {form}"] = in_process(work, "modelopt", form)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


@contextmanager
def working_directory(below: Path | None) -> Iterator[Path]:
    """A temporary directory, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="phireg-quantize-", dir=below) as work:
        yield Path(work)


def in_process(work: Path, step: str, form: str | None) -> dict[str, float] | None:
    """Run a step in a fresh interpreter and show its figures; None if it fails."""
    arguments = [*sys.argv[1:], "--directory", str(work), "--step", step]
    arguments += ["--format", form] if form else []
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    title = f"{step} {form or ''}".strip()
    if ran.returncode:
        print(f"{title}: failed\n{ran.stderr[-2000:]}", flush=True)
        return None
    figures: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    print(f"{title}: {shown}", flush=True)
    return figures


if __name__ == "__main__":
    main()
