"""A group whose commands are imported one by one, and whose errors end in documented ways."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from phireg.cli.failures import reported


class LazyGroup(click.Group):
    """A group with the command ``NAME`` in ``phireg.cli.NAME:command``, hyphens as underscores.

    Args:
        commands_in_order: the names, in the order help shows them.
        args: as for click.Group.
        kwargs: as for click.Group.
    """

    def __init__(self, *args: Any, commands_in_order: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_in_order = commands_in_order

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of use."""
        return list(self.commands_in_order)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.commands_in_order:
            return None
        module = import_module(f"phireg.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what it raises becomes a message and an exit code."""
        with reported():
            return super().invoke(ctx)
