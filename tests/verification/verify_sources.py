"""Tiny sources of four families and their checkpoints.

KV heads are neither one nor all, and the prompts that verify chooses cross both thresholds.
"""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import torch
from helpers.tiny_models import phi2, phi3, phi3_small, randomize
from safetensors.torch import load_file, save_file

import phireg
from phireg.calibration.calibrate import run_calibration
from phireg.calibration.settings import Settings


def maker(make, boost, **changes):
    return lambda: randomize(make(**changes), boost, seed=5, bias=0.3)


FAMILIES = {
    "phi2": maker(phi2, 2.5, intermediate_size=80, num_attention_heads=4),
    "phi3-mini": maker(phi3, 2.5, long=52, intermediate_size=96),
    "phi3-small": maker(phi3_small, 4.0, long=52),
    "phi3-medium": maker(phi3, 2.5, num_key_value_heads=4, vocab_size=105, sliding_window=40),
}
ROOT = []


def source(family, dtype="float32"):
    """The directory of a family's source; written once."""
    directory = ROOT[0] / f"{family}-{dtype}"
    if not directory.exists():
        FAMILIES[family]().to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def converted(family, tp_size=1, dtype="float32"):
    """A correct checkpoint; written once, and not to be changed."""
    directory = ROOT[0] / f"{family}-tp{tp_size}-{dtype}-checkpoint"
    if not directory.exists():
        plan = phireg.plan(source(family), family=family, tp_size=tp_size, dtype=dtype)
        phireg.convert(plan, directory)
    return directory


def copied(family, tp_size, to, dtype="float32"):
    """A copy of a correct checkpoint, to be damaged."""
    return Path(shutil.copytree(converted(family, tp_size, dtype), to))


def edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def load_ranks(directory):
    return [load_file(path) for path in sorted(directory.glob("rank*.safetensors"))]


def save_ranks(directory, ranks):
    for rank, tensors in enumerate(ranks):
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, directory / f"rank{rank}.safetensors")


@lru_cache(None)
def statistics(family):
    """Maxima over random rows, of the source in its own dtype."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(0, 100, (60,), generator=generator).tolist()}] * 8
    path = ROOT[0] / f"{family}-rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    plan = phireg.plan(source(family), family=family)
    settings = Settings(file=path, size=8, device="cpu")
    return run_calibration(plan.chosen.family, plan.source, settings)


def quantized(family, qformat, cache=None, tp_size=1, dtype="float16", alpha=1.0):
    """A correct quantized checkpoint; written once, and not to be changed."""
    directory = ROOT[0] / f"{family}-{qformat}-{cache}-tp{tp_size}-{dtype}-{alpha}"
    if not directory.exists():
        form = {"tp_size": tp_size, "dtype": dtype, "qformat": qformat, "kv_cache_dtype": cache}
        plan = phireg.plan(source(family), family=family, **form)
        phireg.quantize(plan, directory, statistics(family), alpha=alpha)
    return directory
