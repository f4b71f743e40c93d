"""The command's table, its exit codes, and the page it writes."""

import json
import shutil

import pytest
import torch
from helpers.command_line import run_phireg
from safetensors.torch import load_file, save_file
from verify_sources import converted, copied, source

import phireg


def run(*arguments):
    return run_phireg("verify", *arguments)


def test_the_command_passes_and_writes_the_page(tmp_path):
    page = tmp_path / "out.html"
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--report", page)
    assert ran.exit_code == 0
    assert " ".join(ran.stdout.split()).endswith(": verified")  # long paths are folded
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("place", "code"), [("typo/out.html", 2), (".", 6)])
def test_a_report_that_cannot_be_written_is_reported_before_verifying(
    place, code, tmp_path, monkeypatch
):
    monkeypatch.setattr(phireg, "verify", None)
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--report", tmp_path / place)
    assert ran.exit_code == code
    assert "--report" in ran.output or "name of a file" in ran.output
    assert list(tmp_path.iterdir()) == []


def test_the_command_fails_with_4_and_names_the_place(damaged):
    ran = run(damaged, "--model-dir", source("phi3-small"))
    assert ran.exit_code == 4
    assert "layer 1 attention" in ran.stdout
    assert "not verified" in ran.stdout


def test_quick_says_what_it_leaves_out():
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--quick")
    assert ran.exit_code == 0
    assert "not asked for: reading, logits, ranks" in " ".join(ran.stdout.split())


def test_a_check_that_could_not_be_made_is_no_success(tmp_path):
    """A tensor that nobody knows stops the comparison of bytes, whatever they are."""
    model, directory = tmp_path / "model", copied("phi2", 1, tmp_path / "checkpoint")
    shutil.copytree(source("phi2"), model)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "unknown": torch.empty(0)}, model / "model.safetensors")
    path, page = directory / "rank0.safetensors", tmp_path / "page.html"
    content = bytearray(path.read_bytes())
    for at in range(len(content) - 20_000, len(content)):
        content[at] ^= 1  # the last bit of a mantissa or so: logits barely move
    path.write_bytes(content)
    ran = run(directory, "--model-dir", model, "--quick", "--report", page)
    assert ran.exit_code == 8
    assert "incomplete" in ran.stdout and "weights" in ran.stdout
    assert "incomplete" in page.read_text()
    document = json.loads(run(directory, "--model-dir", model, "--quick", "--json").stdout)
    assert (document["verdict"], document["passed"]) == ("incomplete", False)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    assert run(tmp_path / "none", "--model-dir", source("phi2")).exit_code == 3
