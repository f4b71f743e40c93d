"""``phireg new-plugin``: write a new plugin package."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from phireg.cli.help import MODEL, OUTPUT, documented
from phireg.cli.options import Directory, PluginName, json_option
from phireg.cli.output import columns, emit, emit_json, next_steps


@documented(
    "phireg new-plugin acme-phi --from phi3-mini",
    "phireg new-plugin acme-phi --from phi3-mini --directory plugins/acme-phi",
    page="plugin-authors.md",
)
@click.argument("name")
@MODEL.option(
    "--from",
    "base",
    required=True,
    metavar="FAMILY",
    type=PluginName("families"),
    help="Installed family to derive from, or DISTRIBUTION:FAMILY.",
)
@OUTPUT.option("--directory", type=Directory(), help="To create.  [default: NAME]")
@json_option
def command(name: str, base: str, directory: str | None, as_json: bool) -> None:
    """Write an installable package with a family of your own.

    NAME becomes the name of the distribution and of its family. The package holds a family derived
    from FAMILY, its entry point and its conformance test, which passes as generated.
    """
    from phireg.scaffold import new_plugin

    package = new_plugin(name, base, Path(directory) if directory is not None else None)
    shown = shlex.quote(str(package.directory))
    commands = [
        ["pip", "install", "-e", f"{package.directory}[testing]"],
        ["phireg", "families", "--check"],
        ["pytest", str(package.directory)],
    ]
    if as_json:
        provider = package.base
        document = {
            "name": name,
            "module": package.module,
            "base": provider.name,
            "provided_by": {"distribution": provider.distribution, "version": provider.version},
            "directory": package.directory,
            "files": package.files,
            "commands": [shlex.join(words) for words in commands],
        }
        emit_json(document)
        return
    rows = [("family", f"{name}, derived from {package.base.name}"), ("wrote", shown)]
    rows += [("", file) for file in package.files]
    emit(f"{columns(rows)}\n{next_steps(*commands)}")
