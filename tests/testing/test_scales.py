"""Scales that do not follow their weights are found."""

import pytest
from safetensors.torch import load_file, save_file
from testing.acme import BASES, TINY

import phireg
from phireg.reader.schemes import SCHEMES
from phireg.testing.model import TinyModel
from phireg.testing.scales import scale_problems, schemes_of


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("scales")


@pytest.fixture(scope="module")
def source(directory):
    return TinyModel(BASES["small"], TINY["small"], directory).source_dir


def planted(monkeypatch, tmp_path, source, qformat, tensor, damage):
    """The message about a quantized checkpoint at TP 2 with a damaged tensor."""
    model = TinyModel(BASES["small"], TINY["small"], tmp_path)
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
    ],
)
def test_damage_is_located(monkeypatch, tmp_path, source, qformat, tensor, damage):
    message = planted(monkeypatch, tmp_path, source, qformat, tensor, damage)
    assert message.startswith(f"TP 2, {qformat}: rank 1 {tensor.rpartition('.')[0]}.")
    assert "[phi3_small/weights.py:" in message


def test_an_undamaged_checkpoint_passes(monkeypatch, tmp_path, source):
    message = planted(monkeypatch, tmp_path, source, "fp8", f"{LAYER}.mlp.fc.weight", lambda t: t)
    assert message is None


def test_every_scheme_is_tried(directory, source):
    model = TinyModel(BASES["small"], TINY["small"], directory)
    without_groups = [name for name, scheme in SCHEMES.items() if scheme.storage is None]
    assert [scheme.qformat for scheme in schemes_of(model)] == without_groups
