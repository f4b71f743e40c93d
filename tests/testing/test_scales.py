"""Scales that do not follow their weights are found."""

import pytest
from safetensors.torch import load_file, save_file
from testing.acme import BASES, TINY

import phireg
from phireg.reader.schemes import SCHEMES
from phireg.testing.conformance import scale_problems, schemes_of
from phireg.testing.model import TinyModel

SIZES = TINY["small"] | {"hidden_size": 256, "ff_intermediate_size": 512}
"""In which the inputs of every linear make groups, on each of two ranks too."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("scales")


@pytest.fixture(scope="module")
def source(directory):
    return TinyModel(BASES["small"], SIZES, directory).source_dir


def planted(monkeypatch, tmp_path, source, qformat, tensor, damage):
    """The message about a quantized checkpoint at TP 2 with a damaged tensor."""
    model = TinyModel(BASES["small"], SIZES, tmp_path)
    model.source_dir = source
    original = phireg.quantize

    def quantize(plan, output, statistics):
        original(plan, output, statistics)
        tensors = load_file(output / "rank1.safetensors")
        tensors[tensor] = damage(tensors[tensor]).contiguous()
        save_file(tensors, output / "rank1.safetensors")

    monkeypatch.setattr(phireg, "quantize", quantize)
    return scale_problems(model, 2, SCHEMES[qformat])


LAYER = "transformer.layers.1"


@pytest.mark.parametrize(
    "qformat, tensor, damage",
    [
        ("int8_sq", f"{LAYER}.attention.qkv.weights_scaling_factor", lambda t: t.roll(12)),
        ("int8_sq", f"{LAYER}.mlp.proj.prequant_scaling_factor", lambda t: t.flip(0)),
        ("int8_sq", f"{LAYER}.mlp.fc.weight", lambda t: t.roll(2, 0)),
        ("int8_sq", f"{LAYER}.mlp.fc.bias", lambda t: t.roll(2, 0)),
        ("fp8", f"{LAYER}.attention.dense.weights_scaling_factor", lambda t: t * 2),
        ("fp8", f"{LAYER}.mlp.fc.weight", lambda t: t.flip(0)),
        ("int8_wo", f"{LAYER}.mlp.fc.weight", lambda t: t * 1.01),
        ("int4_wo", f"{LAYER}.input_layernorm.weight", lambda t: t.flip(0)),
        ("int4_awq", f"{LAYER}.mlp.fc.weights_scaling_factor", lambda t: t.roll(1, 0)),
        ("w4a8_awq", f"{LAYER}.mlp.proj.prequant_scaling_factor", lambda t: t.flip(0)),
        ("nvfp4", f"{LAYER}.attention.qkv.weight", lambda t: t.flip(0)),
    ],
)
def test_damage_is_located(monkeypatch, tmp_path, source, qformat, tensor, damage):
    message = planted(monkeypatch, tmp_path, source, qformat, tensor, damage)
    assert message.startswith(f"TP 2, {qformat}: rank")
    assert f" {tensor.rpartition('.')[0]}." in message.splitlines()[0]
    assert "[phi3_small/weights.py:" in message


@pytest.mark.parametrize("qformat", SCHEMES)
def test_an_undamaged_checkpoint_passes(monkeypatch, tmp_path, source, qformat):
    fc = f"{LAYER}.mlp.fc.weight"
    assert planted(monkeypatch, tmp_path, source, qformat, fc, lambda t: t) is None


def test_every_scheme_is_tried_whose_groups_fit(directory, source, tmp_path):
    model = TinyModel(BASES["small"], SIZES, directory)
    assert [scheme.qformat for scheme in schemes_of(model, 2)] == list(SCHEMES)
    tiny = TinyModel(BASES["small"], TINY["small"], tmp_path)
    without_groups = [name for name, scheme in SCHEMES.items() if not scheme.grouped]
    assert [scheme.qformat for scheme in schemes_of(tiny, 2)] == without_groups
