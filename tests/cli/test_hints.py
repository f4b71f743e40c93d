"""Every command, given a wrong path: what is wrong, and in a second line what to do."""

import shutil

import pytest
from click.testing import CliRunner

from phireg import demo
from phireg.cli import app

# {none} is not there, {other} is a directory of something else.
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
    (("run", "{ckpt}", "--input-file", "{none}"), "--input-file names a file"),
    (("run", "{ckpt}", "--input-file", "{empty}"), "--input-file names a file"),
    (("run", "{ckpt}", "--prompt", ""), "give it some text"),
    (("run", "{ckpt}", "--chat", "--json"), "leave one of them out"),
    (("run", "{ckpt}", "--prompt", "x", "--seed", "-1"), "use 0 to 2^63 - 1"),
    (("run", "--model-dir", "{model}", "--backend", "executor"), "leave out --backend"),
    (("run", "--model-dir", "{model}", "--prompt", "x", "--tp", "2"), "leave it out"),
    (("verify", "{ckpt}", "--model-dir", "{model}", "--max-tokens", "0"), "use 1 or more"),
    (("summarize", "{ckpt}", "--dataset", "{none}"), "give a file of articles"),
    (("summarize", "{ckpt}", "--dataset-dir", "{file}"), "a copy of ccdv/cnn_dailymail"),
    (("summarize", "{ckpt}", "--dataset-dir", "{other}"), "give a copy of the hub's ccdv/cnn"),
    (("run", "{ckpt}", "--input-file", "{binary}"), "save it as UTF-8"),
    (("summarize", "{ckpt}", "--report", "{none}/page"), "make it first"),
    (("postprocess", "{ckpt}", "--overwrite"), "CKPT itself is replaced"),
    (("postprocess", "{ckpt}", "--revision", "main"), "leave it out"),
    (("convert", "--model-dir", "{model}", "--output-dir", "{file}"), "choose another output"),
    (("convert", "--model-dir", "{model}", "--output-dir", "{file}/x"), "choose another output"),
    (("new-plugin", "mine", "--from", "phi2", "--directory", "{file}/x"), "choose another output"),
    (("demo", "--quiet", "--output-dir", "{other}"), "give --output-dir another place"),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    base = tmp_path_factory.mktemp("places")
    names = ("none", "file", "binary", "other", "empty", "new", "ckpt", "model")
    found = {name: base / name for name in names}
    found["file"].write_text("hello")
    found["binary"].write_bytes(b"\xff\xfe\0")
    found["empty"].mkdir()
    found["other"].mkdir()
    (found["other"] / "readme.txt").write_text("hello")
    shutil.copytree(demo.find("phi3-mini").directory, found["model"])
    args = ["convert", "--model-dir", str(found["model"]), "--output-dir", str(found["ckpt"])]
    assert CliRunner().invoke(app, args).exit_code == 0
    return found


def refused(run, places, words):
    """The line that says what is wrong, and those that say what to do."""
    result = run(*(word.format(**places) for word in words))
    assert result.exit_code in (2, 3, 4, 6), result.output
    assert result.stdout == ""
    first, *hint = result.stderr.splitlines()
    assert first.startswith("error: "), result.output
    assert hint and all(line.startswith("  ") for line in hint), result.output
    assert not places["new"].exists()
    return first, " ".join(hint)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("words", TAKES_A_PATH, ids=" ".join)
def test_a_wrong_path(run, places, words, wrong):
    first, hint = refused(run, places, [wrong if word == "WRONG" else word for word in words])
    assert wrong.format(**places) in first
    assert "give" in hint or "expected config.json" in hint
    assert "other is a TensorRT-LLM checkpoint" not in first


@pytest.mark.parametrize(("words", "says"), OTHERS, ids=[" ".join(words) for words, _ in OTHERS])
def test_what_to_do(run, places, words, says):
    assert says in refused(run, places, words)[1]
