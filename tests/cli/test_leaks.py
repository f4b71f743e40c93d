"""Errors about a file never show what is in it: it may be a link to a secret."""

import json
import shutil

import pytest

import phireg
from phireg import demo

SECRET = "hunter2"
CONTENTS = {
    "shadow": f"root:{SECRET}$y$:19000:0:99999:7:::\ndaemon:{SECRET}:1:\n",
    "words": f"{SECRET} {SECRET}\n{SECRET}\n",
    "json": json.dumps(f"{SECRET} {SECRET}"),
    "object": json.dumps({"model": {"type": SECRET}, "version": SECRET, "added_tokens": SECRET}),
}
RUN = ("--prompt", "x", "--max-new-tokens", 1, "--device", "cpu")
CALIBRATE = ("--output-dir", "{new}", "--qformat", "fp8", "--no-measure", "--model-dir")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model and its checkpoint."""
    base = tmp_path_factory.mktemp("whole")
    shutil.copytree(demo.find("phi2").directory, base / "model")
    phireg.convert(phireg.plan(base / "model"), base / "ckpt")
    return base


def files(directory):
    others = ("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "x.tiktoken")
    return sorted({*(path.name for path in directory.iterdir()), *others} - {"heldback.jsonl"})


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind == "shadow" else pytest.mark.slow) for kind in CONTENTS],
)
def test_no_error_shows_contents(kind, whole, tmp_path, run):
    refused = 0

    def check(*words):
        nonlocal refused
        done = run(*words)
        assert SECRET not in done.output, words
        assert done.exit_code != 1, done.output
        refused += done.exit_code != 0

    for name in files(whole / "model"):
        model = tmp_path / f"model-{name}"
        shutil.copytree(whole / "model", model)
        (model / name).write_text(CONTENTS[kind])
        check("plan", "--model-dir", model)
    for name in files(whole / "ckpt"):
        ckpt = tmp_path / f"ckpt-{name}"
        shutil.copytree(whole / "ckpt", ckpt)
        if name in ("tokenizer.model", "vocab.json", "x.tiktoken"):  # else it is not read
            (ckpt / "tokenizer.json").unlink()
        (ckpt / name).write_text(CONTENTS[kind])
        check("inspect", ckpt, "--check")
        if "token" in name or "config" in name or name == "vocab.json":
            check("run", ckpt, *RUN)
    for suffix in (".jsonl", ".csv", ".parquet"):
        rows = tmp_path / f"rows{suffix}"
        rows.write_text(CONTENTS[kind])
        options = [word.format(new=tmp_path / "new") for word in CALIBRATE]
        check("quantize", *options, whole / "model", "--calib-file", rows)
        check("quantize", *options, whole / "model", "--calib-stats", rows)
    assert refused > 20
