"""``phireg new-plugin``: start a plugin of one's own."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from phireg.cli.options import Directory, json_option
from phireg.cli.output import columns, emit, emit_json


def _families(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from phireg import registry

    return [name for name in registry.index() if name.startswith(incomplete)]


@click.command()
@click.argument("name")
@click.option(
    "--from",
    "base",
    required=True,
    metavar="FAMILY",
    shell_complete=_families,
    help="Installed family to derive from, or DISTRIBUTION:FAMILY.",
)
@click.option("--directory", type=Directory(), metavar="DIR", help="To create.  [default: NAME]")
@json_option
def command(name: str, base: str, directory: str | None, as_json: bool) -> None:
    """Write an installable package with a family of your own.

    NAME becomes the name of the distribution and of its family. The package holds a family derived
    from FAMILY, its entry point and its conformance test, which passes as generated.
    """
    from phireg.scaffold.write import new_plugin

    made = new_plugin(name, base, Path(directory) if directory is not None else None)
    place = shlex.quote(str(made.directory))
    commands = [
        f"pip install -e {shlex.quote(f'{made.directory}[testing]')}",
        "phireg plugins --check",
        f"pytest {place}",
    ]
    if as_json:
        emit_json(
            {
                "name": made.name,
                "module": made.module,
                "base": made.base.name,
                "provided_by": {
                    "distribution": made.base.distribution,
                    "version": made.base.version,
                },
                "directory": str(made.directory),
                "files": list(made.files),
                "commands": commands,
            }
        )
        return
    rows = [("family", f"{made.name}, derived from {made.base.name}"), ("wrote", place)]
    rows += [("", file) for file in made.files]
    emit("\n".join([columns(rows), "", "next:", *(f"    {line}" for line in commands)]))
