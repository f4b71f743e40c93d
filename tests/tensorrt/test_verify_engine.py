"""``phireg verify ENGINE``, with the stand-in as the GPU."""

import json
import shutil

import pytest
import torch
from helpers.command_line import run_phireg
from safetensors.torch import load_file, save_file
from standin import write_engine
from tiny_checkpoints import MAKERS

import phireg
from phireg.errors import PhiregError
from phireg.files.kinds import BUILD_FILE
from phireg.tensorrt import network


def verdicts(verification):
    return {check.name: check.verdict for check in verification.checks}


@pytest.mark.parametrize("family", MAKERS)
def test_a_sound_engine(engines, family):
    directory = engines(family)
    verification = phireg.verify_engine(directory)
    assert verification.verdict == "verified", verification.checks
    assert verdicts(verification) == dict.fromkeys(("files", "network", "running"), "passed")
    recorded = json.loads((directory / BUILD_FILE).read_text())["verified"]
    assert recorded["verdict"] == "passed"
    without = phireg.verify_engine(directory, device="cpu")
    assert without.verdict == "verified in part"
    assert without.unasked == ("running",)


def test_an_engine_that_computes_something_else(engines, monkeypatch):
    directory = engines("phi3-small")
    monkeypatch.setattr(network._Decoder, "_mask", unmasked)
    verification = phireg.verify_engine(directory)
    assert verdicts(verification) == {"files": "passed", "network": "failed", "running": "failed"}
    assert {(p.layer, p.part) for p in verification.check("network").problems} >= {(0, "attention")}
    recorded = json.loads((directory / BUILD_FILE).read_text())["verified"]
    assert recorded["verdict"] == "failed"
    assert recorded["problems"]


def unmasked(self, sparse):
    """All tokens see all slots."""
    positions = self.graph.reshape(self.positions, (0, 1, -1, 1))
    key = torch.full((1, 1, 1, self.capacity), -1, dtype=torch.int32)
    return self.graph.binary("GREATER", positions, self.graph.constant(key))


def test_files_that_changed(engines, checkpoints, tmp_path):
    directory = engines("phi2")
    engine = directory / "rank0.engine"
    engine.write_bytes(engine.read_bytes().replace(b"embedded", b"embeddeX"))
    checkpoint = shutil.copytree(checkpoints("phi2"), tmp_path / "changed")
    rank = checkpoint / "rank0.safetensors"
    content = bytearray(rank.read_bytes())
    content[-9] ^= 64
    rank.write_bytes(content)
    verification = phireg.verify_engine(directory, checkpoint, checks=("files",))
    wrong = {problem.where for problem in verification.check("files").problems}
    assert wrong == {"rank0.engine", "checkpoint"}


def test_a_manifest_that_does_not_say_what_the_engine_was_built_from(engines):
    directory = engines("phi2")
    manifest = json.loads((directory / BUILD_FILE).read_text())
    (directory / BUILD_FILE).write_text(json.dumps(manifest | {"checkpoint": None}))
    checkpoint = directory / json.loads((directory / "rank0.engine").read_text())["checkpoint"]
    verification = phireg.verify_engine(directory, checkpoint, checks=("files",))
    assert verdicts(verification) == {"files": "failed"}


def test_values_that_are_not_finite_are_not_verified(engines, package, checkpoints, tmp_path):
    assert engines.loaded == []
    checkpoint = shutil.copytree(checkpoints("phi2"), tmp_path / "changed")
    tensors = load_file(checkpoint / "rank0.safetensors")
    tensors["transformer.layers.1.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, checkpoint / "rank0.safetensors")
    directory = write_engine(package, tmp_path / "engine", checkpoint)
    verification = phireg.verify_engine(directory, checks=("network", "running"))
    assert verdicts(verification) == {"network": "failed", "running": "failed"}
    assert {p.layer for p in verification.check("network").problems} == {1}


def test_prompts_that_are_left_out_are_told(engines):
    verification = phireg.verify_engine(engines("phi3-mini"), max_tokens=15)
    assert verification.verdict == "verified in part"
    assert set(verification.unasked) == {"network", "running"}


@pytest.mark.parametrize(("capacity", "verdict"), ((24, "incomplete"), (8, "skipped")))
def test_prompts_that_do_not_fit_into_the_engine(engines, capacity, verdict):
    directory = engines("phi3-mini", max_input_len=4, max_seq_len=capacity, max_chunk_len=4)
    verification = phireg.verify_engine(directory)
    expected = {"files": "passed", "network": verdict, "running": verdict}
    assert verdicts(verification) == expected, verification.checks


def test_other_checkpoints_and_none(engines, checkpoints, tmp_path):
    directory = engines("phi2")
    for other in (checkpoints("phi3-mini"), checkpoints("phi3-mini").parent / "source", tmp_path):
        with pytest.raises(PhiregError) as raised:
            phireg.verify_engine(directory, other)
        assert raised.value.hint


def test_without_a_gpu_running_is_not_claimed(engines, monkeypatch):
    monkeypatch.undo()  # of the stand-in for a GPU
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    directory = engines("phi3-medium")
    assert phireg.verify_engine(directory, checks=("running",)).verdict == "incomplete"


def test_the_command(engines, checkpoints):
    directory = engines("phi3-medium")
    result = run_phireg("verify", directory, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["verdict"] == "verified in part"
    source = checkpoints("phi3-medium").parent / "source"
    both = run_phireg("verify", directory, "--model-dir", source, "--device", "cpu", "--json")
    assert both.exit_code == 0, both.stderr
    assert json.loads(both.stdout)["checkpoint"]["verdict"] == "verified"


def test_too_little_memory_for_float32_is_said(package, checkpoints, tmp_path, monkeypatch):
    plan = phireg.plan(checkpoints("phi2").parent / "source", dtype="bfloat16")
    phireg.convert(plan, tmp_path / "checkpoint")
    directory = write_engine(package, tmp_path / "engine", tmp_path / "checkpoint")
    for free, verdict in ((10**9, "passed"), (10**4, "incomplete")):
        monkeypatch.setattr("phireg.verification.engine.free_memory", lambda free=free: free)
        verification = phireg.verify_engine(directory, checks=("network",))
        assert verification.check("network").verdict == verdict
