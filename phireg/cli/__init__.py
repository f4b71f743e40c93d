"""The command line: one module per command, imported when that command is asked for."""

from __future__ import annotations

import os
import signal
from copy import copy
from importlib import import_module
from typing import Any

import click

from phireg.cli.errors import reported, show_warnings, stop, stopped
from phireg.cli.help import write_examples, write_rows
from phireg.cli.output import has_plain_terminal
from phireg.cli.streams import leave, prepare, results_apart

SECTIONS = {
    "Make": ("convert", "quantize", "build", "postprocess", "migrate"),
    "Check": ("plan", "explain", "inspect", "verify"),
    "Use": ("run", "summarize"),
    "Set up": ("demo", "doctor", "families"),
    "For authors of plugins": ("new-plugin",),
}
"""As help shows them; each is ``phireg.cli.NAME:command``, hyphens as underscores."""
COMMANDS = tuple(name for names in SECTIONS.values() for name in names)

EXAMPLES = (
    "phireg demo",
    "phireg convert --model-dir microsoft/phi-2 --output-dir ckpt",
)

EXIT_CODES = """
\b
Exit codes:
  0  done                              6    the output cannot be written
  1  a defect in phireg                7    a builder is missing or failed
  2  wrong usage                       8    a check could not be made
  3  no such model, or a plan refused  130  interrupted (Ctrl-C)
  4  a check failed                    141  standard output was closed
  5  a plugin is missing or broken     143  terminated
"""


class LazyGroup(click.Group):
    """A group whose commands are imported one by one, and whose errors end in exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"phireg.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = copy(module.command)
        assert command.callback is not None
        command.callback = results_apart()(command.callback)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; name the nearest ones to a name that is none."""
        name = args[0].replace("_", "-")
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = get_close_matches(name, COMMANDS, cutoff=0.5)
            meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            ctx.fail(f"There is no command {args[0]!r}.{meant}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, their summaries whole."""
        width = max(map(len, COMMANDS))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                commands = {name: self.get_command(ctx, name) for name in names}
                rows = [
                    (name, command.get_short_help_str(200))
                    for name, command in commands.items()
                    if command is not None
                ]
                write_rows(formatter, rows, width)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes, two examples and the page."""
        super().format_epilog(ctx, formatter)
        write_examples(formatter, EXAMPLES, "command-line.md")

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Read the options; help is printed here, and may fail to be."""
        with reported():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn an exception into a message and an exit code."""
        with reported():
            return super().invoke(ctx)


@click.group(
    cls=LazyGroup,
    epilog=EXIT_CODES,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # TensorRT-LLM's own scripts spell options with underscores.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(package_name="phireg", message="%(prog)s %(version)s")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Convert Microsoft's Phi models to TensorRT-LLM checkpoints.

    Options may be written with hyphens or underscores (--model-dir, --model_dir).
    """
    if os.environ.get("NO_COLOR") or has_plain_terminal():
        ctx.color = False


def main() -> None:
    """Run the command line and end the process with a documented exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell lets its background jobs ignore Ctrl-C; that stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        prepare()
        show_warnings()
        app(prog_name="phireg")
    except SystemExit as end:
        leave(end.code)
    except KeyboardInterrupt as interrupt:
        leave(stopped(interrupt, "nothing was written").exit_code)
