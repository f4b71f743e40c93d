"""`phireg postprocess` on the command line: exit codes, JSON, no tracebacks."""

import json

import grouped_by_hand as hand
import pytest
from grouped_by_hand import content, same
from helpers.command_line import run_phireg


def postprocess(*args):
    result = run_phireg("postprocess", *args)
    assert "Traceback" not in result.output
    return result


def test_the_guides_command(grouped):
    before = content(grouped)
    checked = postprocess(grouped, "--check")
    assert checked.exit_code == 4
    assert "modelopt 0.11.2" in checked.output
    assert "--model-dir" in checked.output  # the original script leaves no mark
    assert postprocess(grouped, "--check", "--quiet").output == ""
    assert content(grouped) == before
    assert postprocess(grouped).exit_code == 0
    same(grouped, hand.right())
    after = content(grouped)
    assert postprocess(grouped, "--check").exit_code == 0
    again = postprocess(grouped)
    assert again.exit_code == 0
    assert "phireg.json" in again.output
    assert "no post-processing" in again.output
    assert json.loads(postprocess(grouped, "--json").output)["tensors"] == 0
    refused = postprocess(grouped, "--output-dir", grouped.parent / "out")
    assert refused.exit_code == 2
    assert not (grouped.parent / "out").exists()
    assert content(grouped) == after


def test_json(grouped, tmp_path):
    document = json.loads(postprocess(grouped, "--check", "--json").output)
    assert document.pop("evidence")
    assert document.pop("order")
    facts = {"checkpoint_dir": str(grouped), "family": "phi3-small", "needed": True, "linears": 2}
    assert document == facts
    source = hand.write_source(tmp_path / "model")
    repaired = postprocess(
        grouped, "--model_dir", source, "--output_dir", tmp_path / "out", "--json"
    )
    document = json.loads(repaired.output)
    assert repaired.exit_code == 0
    assert document["tensors"] == 6
    assert set(document["files"]) == set(content(tmp_path / "out"))
    assert str(source) in document["evidence"][0]
    same(tmp_path / "out", hand.right())


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("", 2),
        ("--check --in-source-order", 2),
        ("--overwrite", 2),
        ("--revision main", 2),
        ("--family unknown", 5),
        ("--model-dir /nowhere", 3),
    ],
)
def test_refusals(tmp_path, options, code):
    directory = hand.write(tmp_path / "ckpt", "fp8")
    before = content(directory)
    assert postprocess(directory, *options.split()).exit_code == code
    assert content(directory) == before


def test_directories(grouped, tmp_path, monkeypatch):
    source = hand.write_source(tmp_path / "model")
    assert postprocess(source).exit_code == 3
    (tmp_path / "file").touch()
    assert postprocess(grouped, "--output-dir", tmp_path / "file").exit_code == 6
    monkeypatch.chdir(grouped)
    assert postprocess(".", "--quiet").output == ""
    same(grouped, hand.right())
