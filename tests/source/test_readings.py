"""Directories with several sets of weights: settled by bytes, or by the user."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import run_phireg
from helpers.tiny_phi3 import INDEX, make_tiny_phi3, shard_path, tiny_tensors
from safetensors.numpy import save_file

import phireg
from phireg.errors import PlanError, SourceError, UsageError
from phireg.findings import Severity
from phireg.source.readings import open_source

pytestmark = pytest.mark.hostile("ambiguous models")

SINGLE = "model.safetensors"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards and their index."""
    make_tiny_phi3(tmp_path / "model")
    return tmp_path / "model"


def other_tensors() -> dict[str, np.ndarray]:
    """A later state of the same model: one bit of one tensor differs."""
    tensors = tiny_tensors()
    changed = tensors["model.norm.weight"].view(np.uint16).copy()
    changed[-1] ^= 1
    return tensors | {"model.norm.weight": changed.view(np.float16)}


def severities(source) -> dict[str, Severity]:
    return {finding.subject: finding.severity for finding in source.findings}


def norm(directory: Path, **readings) -> bytes:
    source = phireg.plan(directory, **readings).source
    tensor = source.tensors["model.norm.weight"]
    data = bytearray(tensor.nbytes)
    with source.open() as reader:
        reader.read_into(tensor, 0, memoryview(data))
    return bytes(data)


def test_equal_sets_are_one_with_a_note(shards):
    save_file(tiny_tensors(), shards / SINGLE)
    torch.save(
        {name: torch.from_numpy(x) for name, x in tiny_tensors().items()},
        shards / "pytorch_model.bin",
    )
    source = open_source(shards)
    assert [file.name for file in source.files] == [SINGLE]
    assert severities(source) == dict.fromkeys((INDEX, "pytorch_model.bin"), Severity.NOTE)


@pytest.mark.parametrize("other", ["model.safetensors", "pytorch_model.bin"])
def test_different_sets_are_an_error_with_options(shards, other):
    if other == SINGLE:
        save_file(other_tensors(), shards / other)
    else:
        torch.save({n: torch.from_numpy(x) for n, x in other_tensors().items()}, shards / other)
    plan = phireg.plan(shards)
    (error,) = plan.errors
    assert (error.code, error.subject) == ("reading", "weights")
    assert all(f"--weights {name} " in error.detail for name in (INDEX, other))
    assert "model.norm.weight" in error.detail
    with pytest.raises(PlanError):
        phireg.convert(plan, shards.parent / "out")
    for command in (
        ("plan", "--model-dir", shards),
        ("convert", "--model-dir", shards, "--output-dir", shards.parent / "out"),
        ("quantize", "--qformat", "int8_wo", "--model-dir", shards, "--output-dir", "out"),
        ("explain", shards, "lm_head"),
    ):
        assert run_phireg(*command).exit_code == 3
        assert run_phireg(*command, "--weights", INDEX, "--help").exit_code == 0
    assert norm(shards, weights=other) == other_tensors()["model.norm.weight"].tobytes()
    assert norm(shards, weights=INDEX) == tiny_tensors()["model.norm.weight"].tobytes()


def test_verify_knows_the_choice_of_the_conversion(shards):
    save_file(other_tensors(), shards / SINGLE)
    out = shards.parent / "out"
    chosen = ("--weights", SINGLE)
    done = run_phireg("convert", "--model-dir", shards, "--output-dir", out, *chosen)
    assert done.exit_code == 0
    options = json.loads((out / "phireg.json").read_text())["options"]
    assert options["readings"] == {"weights": SINGLE, "adapter": None, "tie": None}
    assert run_phireg("verify", out, "--model-dir", shards, "--quick").exit_code == 0
    failed = run_phireg("verify", out, "--model-dir", shards, "--quick", "--weights", INDEX)
    assert failed.exit_code == 4
    assert "ln_f" in failed.output


def test_a_stale_index_is_skipped_with_a_warning(shards):
    for shard in range(3):
        shard_path(shards, shard).unlink()
    save_file(tiny_tensors(), shards / SINGLE)
    source = open_source(shards)
    assert [file.name for file in source.files] == [SINGLE]
    assert severities(source) == {INDEX: Severity.WARNING}
    (shards / SINGLE).unlink()
    with pytest.raises(SourceError, match="missing files"):
        open_source(shards)


def test_half_of_the_shards_beside_a_single_file_is_a_choice(shards):
    shard_path(shards, 1).unlink()
    save_file(tiny_tensors(), shards / SINGLE)
    assert severities(open_source(shards))["weights"] is Severity.ERROR
    assert not phireg.plan(shards, weights=SINGLE).errors


def test_an_index_of_the_single_file_itself_is_no_second_set(shards):
    for shard in range(3):
        shard_path(shards, shard).unlink()
    save_file(tiny_tensors(), shards / SINGLE)
    document = {"weight_map": dict.fromkeys(tiny_tensors(), SINGLE)}
    (shards / INDEX).write_text(json.dumps(document))
    assert severities(open_source(shards)) == {INDEX: Severity.NOTE}


def test_consolidated_weights_beside_others(shards):
    consolidated = shards / "consolidated.safetensors"
    save_file(tiny_tensors(), consolidated)
    assert severities(open_source(shards)) == {consolidated.name: Severity.NOTE}
    save_file({f"x.{name}": x for name, x in tiny_tensors().items()}, consolidated)
    assert severities(open_source(shards)) == {"weights": Severity.ERROR}


def test_weights_under_a_name_of_their_own(tmp_path):
    make_tiny_phi3(tmp_path)
    for shard in range(3):
        shard_path(tmp_path, shard).unlink()
    (tmp_path / INDEX).unlink()
    save_file(tiny_tensors(), tmp_path / "best.safetensors")
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path)
    assert "--weights best.safetensors" in str(caught.value)
    assert not phireg.plan(tmp_path, weights="best.safetensors").errors


@pytest.mark.parametrize("name", ["gone.safetensors", "../x.safetensors", "config.json", "", "."])
def test_a_name_that_is_no_set(shards, name):
    save_file(tiny_tensors(), shards.parent / "x.safetensors")
    with pytest.raises(UsageError) as caught:
        phireg.plan(shards, weights=name)
    assert caught.value.hint


def test_the_hf_backend_asks_too(shards):
    from phireg.generation.backend import Options
    from phireg.generation.hf import load

    save_file(other_tensors(), shards / SINGLE)
    with pytest.raises(SourceError, match="--weights"):
        load(shards, Options(device="cpu"))
