"""Every command, given a wrong path or option: an error that names it, and a hint."""

import shutil

import pytest
from helpers.command_line import run_phireg

from phireg import demo

# {none} does not exist, {other} is a directory of something else.
WRONG = ("{none}", "{file}", "{other}", "{empty}")
TAKES_A_PATH = (
    ("convert", "--output-dir", "{new}", "--model-dir", "WRONG"),
    ("quantize", "--output-dir", "{new}", "--qformat", "fp8", "--model-dir", "WRONG"),
    ("plan", "--model-dir", "WRONG"),
    ("explain", "WRONG", "lm_head"),
    ("inspect", "WRONG"),
    ("verify", "WRONG", "--model-dir", "{model}"),
    ("verify", "{ckpt}", "--model-dir", "WRONG"),
    ("run", "WRONG", "--prompt", "x"),
    ("run", "WRONG", "--backend", "executor", "--prompt", "x"),
    ("run", "--engine-dir", "WRONG", "--prompt", "x"),
    ("run", "--model-dir", "WRONG", "--prompt", "x"),
    ("run", "{ckpt}", "--tokenizer-dir", "WRONG", "--prompt", "x"),
    ("summarize", "WRONG", "--dataset", "demo"),
    ("summarize", "--engine-dir", "WRONG", "--dataset", "demo"),
    ("summarize", "--backend", "hf", "--hf-model-dir", "WRONG", "--dataset", "demo"),
    ("summarize", "{ckpt}", "--tokenizer-dir", "WRONG", "--dataset", "demo"),
    ("postprocess", "WRONG"),
    ("postprocess", "WRONG", "--check"),
    ("postprocess", "{ckpt}", "--model-dir", "WRONG"),
    ("build", "WRONG", "--output-dir", "{new}"),
    ("build", "--dummy-weights", "--model-dir", "WRONG", "--output-dir", "{new}"),
)
OTHERS = (
    ("run", "{ckpt}", "--input-file", "{empty}"),
    ("run", "{ckpt}", "--input-file", "{binary}"),
    ("run", "--model-dir", "{model}", "--backend", "executor"),
    ("run", "--model-dir", "{model}", "--prompt", "x", "--tp", "2"),
    ("verify", "{ckpt}", "--model-dir", "{model}", "--max-tokens", "0"),
    ("summarize", "{ckpt}", "--dataset", "{none}"),
    ("summarize", "{ckpt}", "--dataset-dir", "{file}"),
    ("summarize", "{ckpt}", "--dataset-dir", "{other}"),
    ("summarize", "{ckpt}", "--report", "{none}/page"),
    ("postprocess", "{ckpt}", "--overwrite"),
    ("postprocess", "{ckpt}", "--revision", "main"),
    ("convert", "--model-dir", "{model}", "--output-dir", "{file}"),
    ("convert", "--model-dir", "{model}", "--output-dir", "{file}/x"),
    ("new-plugin", "mine", "--from", "phi2", "--directory", "{file}/x"),
    ("demo", "--quiet", "--output-dir", "{other}"),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    base = tmp_path_factory.mktemp("places")
    names = ("none", "file", "binary", "other", "empty", "new", "ckpt", "model")
    paths = {name: base / name for name in names}
    paths["file"].write_text("hello")
    paths["binary"].write_bytes(b"\xff\xfe\0")
    paths["empty"].mkdir()
    paths["other"].mkdir()
    (paths["other"] / "readme.txt").write_text("hello")
    shutil.copytree(demo.find("phi3-mini").directory, paths["model"])
    args = ("convert", "--model-dir", paths["model"], "--output-dir", paths["ckpt"])
    assert run_phireg(*args).exit_code == 0
    return paths


def refused(run, places, words):
    """Run what is refused; return the line that names the mistake."""
    result = run(*(word.format(**places) for word in words))
    assert result.exit_code in (2, 3, 4, 6), result.output
    assert result.stdout == ""
    error, *hint = result.stderr.splitlines()
    assert error.startswith("error: "), result.output
    assert hint and all(line.startswith("  ") for line in hint), result.output
    assert not places["new"].exists()
    return error


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("words", TAKES_A_PATH, ids=" ".join)
def test_a_wrong_path(run, places, words, wrong):
    error = refused(run, places, [wrong if word == "WRONG" else word for word in words])
    assert wrong.format(**places) in error


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_a_wrong_option(run, places, words):
    refused(run, places, words)
