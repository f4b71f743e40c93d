"""Imports of a fresh interpreter, shell completion, closed outputs, output on a terminal."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from helpers.command_line import run_phireg

import phireg
from phireg import demo
from phireg.cli import app, output
from phireg.cli.output import table

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "huggingface_hub")


def imported(*args):
    command = [sys.executable, "-X", "importtime", "-m", "phireg", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    "args",
    [
        ["families", "--check"],
        ["explain", "MODEL", "lm_head"],
        ["plan", "--model-dir", "MODEL", "--qformat", "fp8"],
        ["plan", "--model-dir", "plugins/phi3_small/demo", "--tp-size", "2"],
        ["convert", "--model-dir", "MODEL", "--output-dir", "OUT"],
        ["convert", "--model-dir", "plugins/phi2/demo", "--output-dir", "OUT"],
    ],
    ids=lambda args: args[0],
)
def test_no_torch_without_need(args, tiny, tmp_path):
    places = {"MODEL": tiny, "OUT": tmp_path / "out"}
    modules = imported(*(places.get(arg, arg) for arg in args))
    assert "phireg.layout" in modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("args", [["--help"], ["quantize", "--help"]])
def test_help_imports_next_to_nothing(args):
    modules = imported(*args)
    assert "click" in modules
    assert not modules & {
        *HEAVY,
        "numpy",
        "rich",
        "pluggy",
        "phireg.planning",
        "phireg.registry",
    }


def test_the_functions_of_the_package_resolve():
    for name in phireg.__all__:
        assert getattr(phireg, name).__doc__, name
    assert set(phireg.__all__) <= set(dir(phireg))
    with pytest.raises(AttributeError):
        _ = phireg.nothing


@pytest.fixture
def complete(spawn):
    def complete(*words):
        variables = {
            "_PHIREG_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(("phireg", *words)),
            "COMP_CWORD": str(len(words)),
        }
        return spawn(env=variables).stdout.split()

    return complete


def test_completion(complete):
    assert complete("p") == ["plain,postprocess", "plain,plan"]
    assert complete("convert", "--family", "phi3-s") == ["plain,phi3-small"]
    assert complete("convert", "--model-dir", "x") == ["dir,x"]
    assert "plain,--model-dir" in complete("convert", "--m")


def test_a_reader_that_leaves_is_not_an_error(tiny):
    done = subprocess.Popen(
        [sys.executable, "-m", "phireg", "plan", "--model-dir", tiny, "--tp-size", "4", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    done.stdout.close()
    assert done.stderr.read() == b""
    assert done.wait(30) == 141


def test_a_full_disk_behind_stdout(tiny, spawn):
    with Path("/dev/full").open("w") as full:
        done = spawn("plan", "--model-dir", tiny, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 6
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(columns, *args, **variables):
    """Output of phireg on a terminal of its own, stdout and stderr together."""
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "phireg", *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"} | variables,
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # how Linux reports the end
            break
        if not block:
            break
        output += block
    os.close(ours)
    assert running.wait(30) == 0
    return output.decode()


def test_progress_on_a_terminal_only(tiny, tmp_path, spawn):
    args = ("convert", "--model-dir", tiny, "--output-dir")
    shown = on_terminal(100, *args, tmp_path / "a")
    assert "flushing to disk" in shown
    assert "kB" in shown
    quiet = on_terminal(100, *args, tmp_path / "b", "--quiet")
    assert quiet == ""
    piped = spawn(*args, tmp_path / "c")
    assert (piped.returncode, piped.stderr) == (0, "")


def test_a_terminal_is_not_overrun_and_names_are_whole(tiny):
    shown = on_terminal(80, "plan", "--model-dir", tiny, "--tp-size", "4")
    lines = [line.split("\r")[-1] for line in ESCAPES.sub("", shown).split("\r\n")]
    assert max(map(len, lines)) <= 80
    assert "15/15 source tensors mapped" in " ".join(lines)


@pytest.fixture(scope="module")
def demo_checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "ckpt"
    source = demo.find("phi3-mini").directory
    run_phireg("convert", "--model-dir", source, "--output-dir", directory)
    return source, directory


@pytest.mark.parametrize(
    "args",
    [
        "convert --model-dir {model} --output-dir {out}",
        "plan --model-dir {model}",
        "explain {model} lm_head",
        "inspect {ckpt}",
        "verify {ckpt} --model-dir {model} --quick",
        "postprocess {ckpt}",
        "run {ckpt} --prompt x --max-new-tokens 1",
        "families",
    ],
    ids=lambda args: args.split()[0],
)
def test_something_moves_before_anything_is_printed(args, demo_checkpoint, tmp_path):
    model, checkpoint = demo_checkpoint
    words = args.format(model=model, ckpt=checkpoint, out=tmp_path / "out").split()
    command = app.get_command(click.Context(app), words[0])
    shown = on_terminal(80, *words)
    assert ESCAPES.sub("", shown).lstrip("\r")[2:].startswith(command.waits)


def test_no_color_and_plain_terminals(demo_checkpoint):
    model, checkpoint = demo_checkpoint
    args = ("verify", checkpoint, "--model-dir", model, "--quick")
    color = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert color.search(on_terminal(80, *args))
    assert not color.search(on_terminal(80, *args, NO_COLOR="1"))
    plain = on_terminal(80, *args, TERM="dumb")
    assert "\x1b" not in plain
    assert plain.startswith("reading the checkpoint ...\r\n")
    assert not re.search(r"[^\r]\r[^\r\n]", plain), "a line was overwritten"


def test_a_table_that_is_too_wide_folds_its_rows_not_its_cells(monkeypatch):
    rows = [
        ("backend", "rouge1", "perplexity"),
        ("executor", "53.39", "2.1"),
        ("hf", "1.00", "9.9"),
    ]
    whole = table(rows, right=(1, 2)).splitlines()
    assert whole[1] == "executor   53.39         2.1"
    monkeypatch.setattr(output, "results", lambda: SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", "20")
    assert table(rows, right=(1, 2)).splitlines() == [
        "backend   rouge1", "executor   53.39", "hf          1.00",
        "backend   perplexity", "executor         2.1", "hf               9.9",
    ]  # fmt: skip
