"""What tests of quantized checkpoints share."""

import pytest
from helpers.by_hand import (
    KV_HEADS,
)
from helpers.plan_sources import MODELS
from safetensors.torch import load_file

import phireg

FORMATS = [("fp8", 1.0), ("int8_sq", 1.0), ("int8_sq", 0.5)]
formats = pytest.mark.parametrize(("qformat", "alpha"), FORMATS)
models = pytest.mark.parametrize("key", list(KV_HEADS))


def plan_of(source, key, qformat, tp=1, dtype="float16", cache=None):
    plan = phireg.plan(
        source,
        family=MODELS[key][0],
        qformat=qformat,
        kv_cache_dtype=cache,
        tp_size=tp,
        dtype=dtype,
    )
    assert not plan.errors
    return plan


def ranks(directory, tp):
    return [load_file(directory / f"rank{index}.safetensors") for index in range(tp)]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}
