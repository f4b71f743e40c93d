"""The commands in docs/guide.md and docs/gpu-host.md parse, and JSON keys are documented."""

import json
import re
import shlex
from pathlib import Path
from string import Template

import click
import pytest

from phireg.cli import COMMANDS, app
from phireg.trtllm.command import BuildOptions, translate

DOCS = Path(__file__).parents[2] / "docs"


def commands(name):
    """Every phireg command of a page's shell blocks, with the values of its variables."""
    text = (DOCS / name).read_text()
    variables = dict(re.findall(r"^(\w+)=(\S+)$", text, re.MULTILINE))
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:mpirun -n 2 --allow-run-as-root\s+)?phireg (.*)", line.strip())
            if match:
                yield Template(" ".join(match[1].split())).safe_substitute(variables)


LINES = sorted({*commands("guide.md"), *commands("gpu-host.md")})


def test_the_pages_have_commands():
    assert {line.split()[0] for line in LINES} >= {
        "convert", "verify", "build", "run", "summarize", "quantize", "postprocess", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line):
    name, *arguments = shlex.split(line, comments=True)
    if name not in COMMANDS:
        pytest.skip(f"phireg {name} is not there")
    with click.Context(app, **app.context_settings) as group:
        command = app.get_command(group, name)
        command.make_context(name, arguments, parent=group)


def test_json_keys(run, split, tmp_path):
    text = (DOCS / "command-line.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    shown = run("build", split, "--output-dir", tmp_path / "engine", "--print-command", "--json",
                "--trtllm-version", "1.2.1")  # fmt: skip
    undocumented = {key for key in json.loads(shown.output) if f"`{key}`" not in sections["build"]}
    assert undocumented == set()


def test_the_example_of_print_command(checkpoints):
    """The flags of the documented example, without the paths and with the model's own lengths."""
    text = (DOCS / "command-line.md").read_text()
    (line,) = re.findall(
        r"^trtllm-build --checkpoint_dir ckpt --output_dir engine (.*)$", text, re.M
    )
    config = json.loads((checkpoints / "ckpt1" / "config.json").read_text())
    options = BuildOptions(
        max_input_len=1024,
        max_output_len=1024,
        gemm_plugin="auto",
        extra=("--max_num_tokens", "4096"),
    )
    given = translate(config | {"max_position_embeddings": 4096}, options, "0.17.0")
    assert " ".join(given.flags) == line
