"""The linears of a Hugging Face directory are measured like those of the checkpoint it equals."""

import pytest
import torch
from helpers import by_hand

import phireg
from phireg.executor import load
from phireg.quality.layerwise import compare_layers


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
def test_both_layouts_have_the_same_errors(tmp_path, qformat):
    tensors = {name: 0.3 * tensor for name, tensor in by_hand.model("mini").items()}
    source = by_hand.write_model(tmp_path / "model", "mini", tensors)
    phireg.convert(phireg.plan(source, dtype="float32"), tmp_path / "plain")
    linears = {}
    for target in ("trtllm", "hf-modelopt"):
        plan = phireg.plan(source, dtype="float32", qformat=qformat, target=target)
        phireg.quantize(plan, tmp_path / target, by_hand.calibration("mini"))
        models = [load(tmp_path / name, dtype=torch.float32) for name in ("plain", target)]
        linears[target], _, _ = compare_layers(
            *models, [[3, 1, 4, 1, 5, 9, 2, 6]], lambda more: None
        )
    for ours, theirs in zip(linears["hf-modelopt"], linears["trtllm"], strict=True):
        assert (ours.layer, ours.linear) == (theirs.layer, theirs.linear)
        assert ours.weight == pytest.approx(theirs.weight, rel=1e-3)
        assert ours.activation == pytest.approx(theirs.activation, rel=1e-3)
        assert ours.saturation == pytest.approx(theirs.saturation, abs=1e-6)
        assert 0 < ours.weight < 0.1
