"""A Phi-3 written as a Llama gives transformers' logits of the Phi-3."""

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import phireg
from phireg.executor import load
from phireg.generation.backend import default_backend
from phireg.verification.result import QUICK

MODELS = {
    "heads": {},
    "groups": {"num_key_value_heads": 2},
    "long rope": {"long": 20},
    "tied": {"tie_word_embeddings": True},
}


def logits(directory, dtype, length):
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ids = torch.randint(0, 103, (2, length), generator=torch.Generator().manual_seed(length))
    return type(model).__name__, model.eval()(ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_phi3(tmp_path, name):
    tiny_models.phi3(**MODELS[name]).to(torch.bfloat16).save_pretrained(tmp_path / "phi3")
    plan = phireg.plan(tmp_path / "phi3", target="hf", form="llama")
    phireg.convert(plan, tmp_path / "llama")
    for length in (7, 40):  # of long rope, one on either side of the switch
        kind, expected = logits(tmp_path / "phi3", torch.bfloat16, length)
        other, actual = logits(tmp_path / "llama", torch.bfloat16, length)
        assert (kind, other) == ("Phi3ForCausalLM", "LlamaForCausalLM")
        assert torch.equal(actual, expected)
    expected, actual = (logits(tmp_path / d, torch.float32, 40)[1] for d in ("phi3", "llama"))
    assert torch.allclose(actual, expected, rtol=0, atol=1e-4)
    ids = torch.randint(0, 103, (2, 40), generator=torch.Generator().manual_seed(40))
    assert default_backend(tmp_path / "llama") == "executor"
    assert torch.allclose(
        load(tmp_path / "llama", dtype=torch.float32)(ids), actual, rtol=0, atol=1e-4
    )


def test_verify_finds_exchanged_projections(tmp_path):
    tiny_models.phi3().to(torch.bfloat16).save_pretrained(tmp_path / "phi3")
    phireg.convert(phireg.plan(tmp_path / "phi3", target="hf", form="llama"), tmp_path / "llama")
    path, layer = tmp_path / "llama" / "model.safetensors", "model.layers.1.mlp"
    result = phireg.verify(tmp_path / "llama", model_dir=tmp_path / "phi3")
    assert result.verdict == "verified"
    tensors = load_file(path)
    gate, up = f"{layer}.gate_proj.weight", f"{layer}.up_proj.weight"
    tensors[gate], tensors[up] = tensors[up].clone(), tensors[gate].clone()
    save_file(tensors, path)
    result = phireg.verify(tmp_path / "llama", model_dir=tmp_path / "phi3", checks=QUICK)
    (problem,) = [p for check in result.checks for p in check.problems]
    assert gate in problem.where
    assert problem.layer == 1


@pytest.mark.parametrize(
    ("name", "changes", "subject"),
    [
        ("phi2", {}, "architectures"),
        ("phi3-small", {}, "architectures"),
        ("phi3-tied", {"sliding_window": 100}, "sliding_window"),
        ("phi3-tied", tiny_models.rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ],
)
def test_what_llama_cannot_compute_is_refused(tmp_path, name, changes, subject):
    tiny_models.write(name, tmp_path)
    tiny_models.edit_config(tmp_path, **changes)
    plan = phireg.plan(tmp_path, target="hf", form="llama")
    assert ("target", subject) in {(finding.code, finding.subject) for finding in plan.errors}


def test_other_targets_have_no_forms(tmp_path):
    for target in ("trtllm", "hf-modelopt"):
        with pytest.raises(phireg.errors.UsageError):
            phireg.plan(tmp_path, target=target, form="llama")
