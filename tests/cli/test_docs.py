"""docs/command-line.md names every command, option, exit code and JSON key."""

import json
import re
from pathlib import Path

import click
import pytest

from phireg import errors
from phireg.cli import COMMANDS, app

ROOT = Path(__file__).parents[2]

TEXT = (ROOT / "docs" / "command-line.md").read_text()
INTRODUCTION = TEXT.partition("\n## ")[0]
SECTIONS = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", COMMANDS)
def test_options(name):
    command = app.get_command(click.Context(app), name)
    assert f"phireg {name}" in TEXT
    assert command.get_short_help_str(100) in TEXT
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in INTRODUCTION + SECTIONS[name], parameter.opts


def test_exit_codes():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)}
    raised = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    assert codes == raised | {0, 130, 141, 143}


def keys(document):
    """All keys, but not those that are names of files, tensors or config fields."""
    if isinstance(document, list):
        return {key for item in document for key in keys(item)}
    if not isinstance(document, dict):
        return set()
    inner = {
        key
        for name, value in document.items()
        if name not in ("config", "manifest", "losses", "ranks", "provenance", "scores")
        and "." not in name
        for key in keys(value)
    }
    return {key for key in document if "." not in key} | inner


def test_json_keys(tiny, run):
    out, demo = tiny.parent / "out", tiny.parent / "demo"
    ids = tiny.parent / "ids.jsonl"
    ids.write_text('{"input_ids": [1, 2, 3]}\n' * 3)
    quantize = ("quantize", "--quiet", "--qformat", "fp8", "--calib-file", ids, "--calib-size", 2)
    for args in (
        ("plan", "--model-dir", tiny),
        ("plan", "--model-dir", tiny, "--qformat", "fp8", "--kv-cache-dtype", "fp8"),
        ("convert", "--model-dir", tiny, "--output-dir", out),
        (*quantize, "--model-dir", tiny, "--output-dir", tiny.parent / "fp8", "--device", "cpu"),
        ("explain", tiny, "lm_head"),
        ("inspect", out, "--check"),
        ("build", out, *("--output-dir", tiny, "--print-command", "--trtllm-version", "1.2.1")),
        ("build", out, "--output-dir", tiny, "--print-command", "--backend", "tensorrt-rtx"),
        ("demo", "phi3-small", "--output-dir", demo),
        ("verify", out, "--model-dir", tiny),
        ("run", demo, "--prompt", "A fire", "--max-new-tokens", 2, "--device", "cpu"),
        ("summarize", demo, "--max-ite", 1, "--check-accuracy", "--device", "cpu"),
        ("families",),
    ):
        document = json.loads(run(*args, "--json").output)
        others = {"explain": "plan", "convert": "plan", "demo": "verify", "quantize": "plan"}
        section = SECTIONS[args[0]] + SECTIONS.get(others.get(args[0]), "")
        assert {key for key in keys(document) if f"`{key}`" not in section} == set()
