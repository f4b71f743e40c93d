"""`phireg postprocess` on the command line: exit codes, what it prints, no tracebacks."""

import json

import pytest
from grouped_by_hand import (
    EARLY,
    block_rows,
    checkpoint,
    content,
    rank_rows,
    same,
    source_tensors,
    write_checkpoint,
    write_source,
)
from helpers.command_line import run_phireg

TENSORS = source_tensors()
RIGHT = checkpoint("fp8", TENSORS, rank_rows)


@pytest.fixture
def grouped(tmp_path):
    ranks = checkpoint("fp8", TENSORS, block_rows)
    return write_checkpoint(tmp_path / "ckpt", "fp8", ranks, **EARLY)


def test_the_guides_command(grouped):
    before = content(grouped)
    checked = run_phireg("postprocess", grouped, "--check")
    assert checked.exit_code == 4
    assert "modelopt 0.11.2" in checked.output
    assert "--model-dir" in checked.output  # the original script leaves no mark
    assert content(grouped) == before
    done = run_phireg("postprocess", grouped)
    assert done.exit_code == 0
    same(grouped, RIGHT)
    for expected in ("phi3-small", "the source's order", "4 tensors of 2 linears"):
        assert expected in done.output
    after = content(grouped)
    assert run_phireg("postprocess", grouped, "--check").exit_code == 0
    again = run_phireg("postprocess", grouped)
    assert again.exit_code == 2
    assert "phireg.json" in again.output
    assert content(grouped) == after


def test_json(grouped, tmp_path):
    document = json.loads(run_phireg("postprocess", grouped, "--check", "--json").output)
    assert document == {
        "checkpoint_dir": str(grouped),
        "family": "phi3-small",
        "needed": True,
        "order": "the source's order",
        "linears": 2,
        "evidence": document["evidence"],
    }
    source = write_source(tmp_path / "model", TENSORS)
    done = run_phireg(
        "postprocess", grouped, "--model_dir", source, "--output_dir", tmp_path / "out", "--json"
    )
    document = json.loads(done.output)
    assert done.exit_code == 0
    assert document["tensors"] == 4
    assert set(document["files"]) == {
        "config.json", "notes.txt", "phireg.json", "rank0.safetensors", "tokenizer.json"
    }  # fmt: skip
    assert str(source) in document["evidence"][0]
    same(tmp_path / "out", RIGHT)


def test_quiet(grouped):
    assert run_phireg("postprocess", grouped, "--check", "--quiet").output == ""
    assert run_phireg("postprocess", grouped, "--quiet").output == ""


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((), 2),
        (("--check", "--in-source-order"), 2),
        (("--check", "--output-dir", "x"), 2),
        (("--overwrite",), 2),
        (("--revision", "main"), 2),
        (("--family", "phi2"), 2),
        (("--family", "unknown"), 5),
        (("--model-dir", "/nowhere"), 3),
    ],
)
def test_refusals(tmp_path, args, code):
    ranks = checkpoint("fp8", TENSORS, block_rows)
    directory = write_checkpoint(tmp_path / "ckpt", "fp8", ranks)
    before = content(directory)
    refused = run_phireg("postprocess", directory, *args)
    assert refused.exit_code == code, refused.output
    assert "Traceback" not in refused.output
    assert content(directory) == before


def test_other_directories(tmp_path):
    assert run_phireg("postprocess", tmp_path / "nothing").exit_code == 3
    assert run_phireg("postprocess", tmp_path).exit_code == 3
    source = write_source(tmp_path / "model", TENSORS)
    assert run_phireg("postprocess", source).exit_code == 3


def test_the_working_directory(grouped, monkeypatch):
    monkeypatch.chdir(grouped)
    assert run_phireg("postprocess", ".").exit_code == 0
    same(grouped, RIGHT)


def test_output_that_cannot_be_written(grouped, tmp_path):
    (tmp_path / "file").write_text("")
    refused = run_phireg("postprocess", grouped, "--output-dir", tmp_path / "file")
    assert refused.exit_code == 6
    assert (tmp_path / "file").read_text() == ""
