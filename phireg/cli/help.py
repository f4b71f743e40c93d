"""Help of commands: options in groups, two examples and a page; rare options on request."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ALL = "phireg.cli.help.all"
_FIRST_COLUMN = 28


class Option(click.Option):
    """An option in a group; only ``--help-all`` shows rare ones and other spellings."""

    def __init__(
        self,
        *args: Any,
        group: str,
        rare: bool = False,
        aliases: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.group = group
        self.rare = rare
        self.aliases = list(aliases)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Accept the other spellings, too."""
        shown = self.opts
        self.opts = [*shown, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return what is added to the text, without the range of numbers."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the line of help; with ``--help-all`` it ends with the other spellings."""
        record = super().get_help_record(ctx)
        if record is None or not (self.aliases and ctx.meta.get(_ALL)):
            return record
        return record[0], f"{record[1]}  [or: {', '.join(self.aliases)}]".lstrip()


class Group(str):
    """The title of options in help; every option of a command is made by ``Group.option``."""

    __slots__ = ()

    def option(
        self, *names: str, rare: bool = False, aliases: Sequence[str] = (), **settings: Any
    ) -> Callable[[_Function], _Function]:
        """Add an option of this group; ``aliases`` are further spellings, ``rare`` hides it."""
        settings = {"show_default": True, "rare": rare, "aliases": aliases} | settings
        return click.option(*names, cls=Option, group=self, **settings)


MODEL = Group("Model")
CHECKPOINT = Group("Checkpoint")
PROMPTS = Group("Prompts")
RANKS = Group("Ranks")
QUANTIZATION = Group("Quantization")
CALIBRATION = Group("Calibration")
ENGINE = Group("Engine")
TEXT = Group("Text")
ACCURACY = Group("Accuracy")
RUNNING = Group("Running")
SERVER = Group("Server")
OUTPUT = Group("Output")
DISPLAY = Group("Display")
GROUPS = (
    *(MODEL, CHECKPOINT, OUTPUT, RANKS, QUANTIZATION, CALIBRATION, ENGINE, PROMPTS, TEXT),
    *(ACCURACY, RUNNING, SERVER, DISPLAY),
)
"""In the order of help."""


class Command(click.Command):
    """A command whose help has groups of options, examples and the page that tells more."""

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str] = (),
        page: str = "",
        waits: str = "",
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.examples = examples
        self.waits = waits
        self.page = page or f"command-line.md#{self.name}"
        show_all = Option(
            ["--help-all"],
            group=DISPLAY,
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_all,
            help="Show rare options and other spellings, too.",
        )
        self.params.append(show_all)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, on a terminal below a spinner until it shows something itself."""
        if not self.waits or not sys.stderr.isatty():
            return super().invoke(ctx)
        from phireg.cli.output import waiting

        with waiting(self.waits, quiet=ctx.params.get("quiet", False)):
            return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Name the options that are required."""
        required = [
            f"{parameter.opts[0]} {parameter.make_metavar(ctx)}"
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option) and parameter.required
        ]
        options, *arguments = super().collect_usage_pieces(ctx)
        return [*arguments, *required, options]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups; rare options only where all are asked for."""
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
        for parameter in self.get_params(ctx):
            if getattr(parameter, "rare", False) and not ctx.meta.get(_ALL):
                continue
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups[getattr(parameter, "group", DISPLAY)].append(record)
        firsts = [first for records in groups.values() for first, _ in records]
        width = max(len(first) for first in firsts if len(first) <= _FIRST_COLUMN)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    write_rows(formatter, records, width)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, unfolded so that they can be copied, and the page."""
        super().format_epilog(ctx, formatter)
        write_examples(formatter, self.examples, self.page)


def write_rows(formatter: click.HelpFormatter, rows: Sequence[tuple[str, str]], width: int) -> None:
    """Write terms and texts in columns; no name is broken at its hyphens."""
    blank = " " * (formatter.current_indent + width + 2)
    for term, text in rows:
        start = f"{'':{formatter.current_indent}}{term:{width}}  "
        if len(term) > width:
            formatter.write(f"{start.rstrip()}\n")
            start = blank
        lines = textwrap.wrap(
            text,
            formatter.width - 1,
            initial_indent=start,
            subsequent_indent=blank,
            break_on_hyphens=False,
        )
        formatter.write("\n".join(lines or [start.rstrip()]) + "\n")


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str], page: str) -> None:
    """Write the end of a help text."""
    with formatter.section("Examples"):
        for example in examples:
            formatter.write(f"  {example}\n".replace("\n    ", "\n      "))
    formatter.write(f"\nMore: docs/{page}\n")


def _show_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def documented(
    *examples: str, page: str = "", waits: str = "", cls: type[Command] = Command, **settings: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command; ``waits`` is what a spinner says until it shows something."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        name = function.__module__.rpartition(".")[2].replace("_", "-")
        return click.command(name, cls=cls, examples=examples, page=page, waits=waits, **settings)(
            function
        )

    return decorate
