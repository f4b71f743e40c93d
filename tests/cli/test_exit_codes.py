"""The same mistake has the same exit code in every command: docs/command-line.md's table."""

import json
import os
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
from helpers.command_line import run_phireg
from helpers.tiny_phi3 import make_tiny_phi3

from phireg import demo

TABLE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
ROWS = dict(re.findall(r"^\| (\w[^|`]+) \| (\d) \|$", TABLE.partition("## demo")[0], re.MULTILINE))
OUT = ("--output-dir", "{out}")
SHOWN = ("--print-command", "--trtllm-version", "1.2.1")
ALL = {
    "model": {
        "convert": ("convert", *OUT, "--model-dir"),
        "quantize": ("quantize", *OUT, "--qformat", "fp8", "--device", "cpu", "--model-dir"),
        "plan": ("plan", "--model-dir"),
        "explain": ("explain", "--rank", "0", "--", "{PLACE}", "lm_head"),
        "verify": ("verify", "{checkpoint}", "--model-dir"),
        "postprocess": ("postprocess", "{checkpoint}", "--model-dir"),
        "build": ("build", "--dummy-weights", *OUT, *SHOWN, "--model-dir"),
        "run": ("run", "--prompt", "x", "--model-dir"),
        "summarize": ("summarize", "--backend", "hf", "--dataset", "demo", "--hf-model-dir"),
    },
    "checkpoint": {
        "inspect": ("inspect",),
        "verify": ("verify", "--quick", "--model-dir", "{model}"),
        "postprocess": ("postprocess",),
        "build": ("build", *OUT, *SHOWN),
        "run": ("run", "--backend", "executor", "--input-file", "{ids}"),
        "summarize": ("summarize", "--dataset", "demo"),
    },
    "engine": {
        "run": ("run", "--backend", "tensorrt-llm", "--input-file", "{ids}"),
        "run --engine-dir": ("run", "--input-file", "{ids}", "--engine-dir"),
    },
}
"""By what they take: command lines that end before it, or have PLACE for it."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories with a mistake each, and good ones."""
    base = tmp_path_factory.mktemp("places")
    model, checkpoint = base / "model", base / "checkpoint"
    make_tiny_phi3(model)
    ranks = ("--tp-size", 2, "--quiet")
    run_phireg("convert", "--model-dir", model, "--output-dir", base / "textless", *ranks)
    trained = demo.find("phi3-mini").directory
    run_phireg("convert", "--model-dir", trained, "--output-dir", checkpoint, *ranks)
    shards = ("--target", "hf", "--max-shard-size", "1MB", "--quiet")
    run_phireg("convert", "--model-dir", trained, "--output-dir", base / "directory", *shards)
    (base / "empty").mkdir()
    (base / "file").write_text("x")
    (base / "ids").write_text('{"input_ids": [1]}\n')
    engine = base / "engine"
    engine.mkdir()
    blocks = {"pretrained_config": {}, "build_config": {}}
    (engine / "config.json").write_text(json.dumps(blocks))
    for name, source in (("model", model), ("checkpoint", checkpoint), ("engine", engine)):
        bad = shutil.copytree(source, base / f"{name} without JSON")
        (bad / "config.json").write_text("{")
    for name, damage in (
        ("truncated", lambda file: os.truncate(file, 3000)),
        ("less a rank", lambda file: file.unlink()),
    ):
        damage(shutil.copytree(checkpoint, base / name) / "rank1.safetensors")
        shards = shutil.copytree(base / "directory", base / f"directory {name}")
        damage(sorted(shards.glob("model-*.safetensors"))[1])
    whole = shutil.copytree(base / "directory", base / "directory without weights")
    for file in whole.glob("model*"):
        file.unlink()
    paths = {path.name: path for path in base.iterdir()}
    return paths | {"missing": base / "missing", "out": base / "out"}


WRONG = {
    "model": ("missing", "empty", "file", "checkpoint", "engine", "model without JSON"),
    "checkpoint": ("missing", "empty", "file", "model", "engine", "checkpoint without JSON"),
    "engine": ("missing", "empty", "file", "model", "checkpoint", "engine without JSON"),
}


def exit_code(words, places, place=None):
    if place is not None and "{PLACE}" not in words:
        words = (*words, "{PLACE}")
    result = run_phireg(*(str(word).format(**places, PLACE=place) for word in words))
    assert "Traceback" not in result.output
    assert not places["out"].exists()
    return result.exit_code


@pytest.mark.parametrize(
    ("kind", "command", "wrong"),
    [
        (kind, command, wrong)
        for kind in ALL
        for command in ALL[kind]
        for wrong in WRONG[kind]
        if (command, wrong) != ("summarize", "engine")  # it takes both
        and (command, wrong) not in (("inspect", "model"), ("verify", "model"))
    ],
)
def test_what_is_no_such_thing(kind, command, wrong, places):
    expected = int(
        ROWS["nothing there, another kind of directory, a config.json that cannot be read"]
    )
    assert exit_code(ALL[kind][command], places, places[wrong]) == expected


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        *product(ALL["checkpoint"], ("truncated", "less a rank")),
        *product(
            ("inspect", "verify", "run", "summarize"),
            ("directory truncated", "directory less a rank", "directory without weights"),
        ),
    ],
)
def test_a_checkpoint_with_a_damaged_or_missing_file(command, wrong, places):
    expected = int(
        ROWS["a rank file, or a weight file that phireg wrote, that is damaged or missing"]
    )
    assert exit_code(ALL["checkpoint"][command], places, places[wrong]) == expected


@pytest.mark.parametrize("command", ["quantize", "run", "summarize"])
def test_text_without_a_tokenizer(command, places):
    words = {
        "quantize": (
            "quantize",
            *ARGUMENTS["quantize"],
            "--calib-dataset",
            "builtin",
            "--no-measure",
        ),
        "run": ("run", "{textless}", "--prompt", "x"),
        "summarize": ("summarize", "{textless}", "--dataset", "demo"),
    }[command]
    assert exit_code(words, places) == int(ROWS["text, but no tokenizer"])


ARGUMENTS = {
    "convert": ("--model-dir", "{model}", *OUT),
    "quantize": ("--model-dir", "{model}", *OUT, "--qformat", "fp8"),
    "plan": ("--model-dir", "{model}"),
    "explain": ("{model}", "lm_head"),
    "verify": ("{checkpoint}", "--model-dir", "{model}"),
    "postprocess": ("{checkpoint}",),
    "build": ("--dummy-weights", "--model-dir", "{model}", *OUT, *SHOWN),
    "run": ("{checkpoint}", "--input-file", "{ids}"),
    "summarize": ("{checkpoint}", "--dataset", "demo"),
    "inspect": ("{checkpoint}",),
}


@pytest.mark.parametrize(
    ("option", "row", "commands"),
    [
        (("--no-such-option",), "an unknown option or value", ARGUMENTS),
        (("--dtype", "float8"), "an unknown option or value",
         ("convert", "quantize", "plan", "explain", "verify", "build", "run", "summarize")),
        (("--device", "abacus"), "an unknown option or value",
         ("quantize", "verify", "run", "summarize")),
        (("--tp-size", "-1"), "an unknown option or value",
         ("convert", "quantize", "plan", "explain", "build", "run", "summarize")),
        (("--family", "phi9"), "a family that does not exist or is broken",
         ("convert", "quantize", "plan", "explain", "verify", "postprocess", "build")),
    ],
)  # fmt: skip
def test_wrong_options(option, row, commands, places):
    codes = {name: exit_code((name, *ARGUMENTS[name], *option), places) for name in commands}
    assert codes == dict.fromkeys(commands, int(ROWS[row]))


@pytest.mark.parametrize("command", ["convert", "quantize", "build", "postprocess"])
def test_an_output_that_is_something_else(command, places, tmp_path):
    mine = tmp_path / "thesis.tex"
    mine.write_text("years")
    words = {
        "convert": ("--model-dir", "{model}"),
        "quantize": ("--model-dir", "{model}", "--qformat", "int8_wo"),
        "build": ("{checkpoint}",),
        "postprocess": ("{checkpoint}", "--in-source-order"),
    }[command]
    code = exit_code((command, *words, "--overwrite", "--output-dir", tmp_path), places)
    assert mine.read_text() == "years"
    assert command in ("build", "postprocess") or code == int(
        ROWS["an output that exists, or cannot be written"]
    )
