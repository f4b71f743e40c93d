"""Help of every command: groups, examples that parse, a page that exists; mistyped names."""

import re
import shlex
from pathlib import Path

import click
import pytest

from phireg.cli import COMMANDS, EXAMPLES, SECTIONS, app
from phireg.cli.help import GROUPS, Option

DOCS = Path(__file__).parents[2] / "docs"


def command_named(name):
    return app.get_command(click.Context(app), name)


def test_help_shows_every_summary_whole_under_its_section(run):
    lines = run("--help").output.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for title, names in SECTIONS.items():
        assert f"{title}:" in lines
        for name in names:
            assert f"{name} {command_named(name).get_short_help_str(500)}" in text
    assert "..." not in text.partition("Options:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_a_group_and_help_fits_the_terminal(name, run):
    command = command_named(name)
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert all(isinstance(option, Option) and option.group in GROUPS for option in options)
    folded, whole = run(name, "--help").output, run(name, "--help-all").output
    parts = folded.partition("\nExamples:\n")
    assert max(map(len, folded.splitlines())) <= 80
    for option in options:
        spellings = {*option.opts, *option.secondary_opts}
        assert option.hidden or all(spelling in whole for spelling in spellings)
        for spelling in (*option.aliases, *(spellings if option.rare else ())):
            assert re.search(rf"{spelling}(?![\w-])", whole), spelling
            assert not re.search(rf"{spelling}(?![\w-])", parts[0]), spelling


@pytest.mark.parametrize("name", [*COMMANDS, None])
def test_examples_parse_and_the_page_exists(name):
    examples, page = EXAMPLES, "command-line.md"
    if name is not None:
        examples, page = command_named(name).examples, command_named(name).page
    assert len(examples) >= 2
    for example in examples:
        program, called, *words = shlex.split(example)
        assert program == "phireg"
        assert name in (called, None)
        command_named(called).make_context(called, words, parent=click.Context(app))
    file, _, anchor = page.partition("#")
    text = (DOCS / file).read_text()
    assert not anchor or f"\n## {anchor}\n" in text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("convrt", "convert"), ("convert_checkpoint", "convert"), ("summarise", "summarize")],
)
def test_a_mistyped_command_is_answered_with_the_nearest(typed, meant, run):
    result = run(typed)
    assert result.exit_code == 2
    assert repr(meant) in result.output


def test_a_word_like_nothing_is_no_command(run):
    result = run("xyzzy")
    assert result.exit_code == 2
    assert "mean" not in result.output


def test_help_of_target_names_what_the_command_writes(run):
    assert "trtllm" in run("convert", "--help").output
    assert "trtllm" not in run("migrate", "--help").output
