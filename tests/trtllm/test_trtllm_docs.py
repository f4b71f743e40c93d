"""The commands in docs/guide.md and docs/gpu-host.md parse, and the example of flags is true."""

import json
import re
import shlex
from pathlib import Path
from string import Template

import click
import pytest

from phireg.cli import app
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
assert LINES


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line):
    name, *arguments = shlex.split(line, comments=True)
    with click.Context(app, **app.context_settings) as group:
        command = app.get_command(group, name)
        command.make_context(name, arguments, parent=group)


def test_the_example_of_print_command(checkpoint):
    """The flags of the documented example, without the paths and with the model's own lengths."""
    text = (DOCS / "command-line.md").read_text()
    (line,) = re.findall(
        r"^trtllm-build --checkpoint_dir ckpt --output_dir engine (.*)$", text, re.M
    )
    config = json.loads((checkpoint / "config.json").read_text())
    extra = ("--max_num_tokens", "4096")
    options = BuildOptions(max_input_len=1024, max_output_len=1024, gemm_plugin="auto", extra=extra)
    command = translate(config | {"max_position_embeddings": 4096}, options, "0.17.0")
    assert " ".join(command.flags) == line
