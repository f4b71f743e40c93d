"""Render the templates of this package, and write a page so that it is complete or absent."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from phireg.files.writing import write_file

WIDTH = 900
"""Width of every chart, in pixels of its own."""


def render_template(template: str, **values: Any) -> str:
    """Fill a template in; everything that a value holds is escaped."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("phireg.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["px"] = "{:.1f}".format
    return environment


def write_page(page: str, path: Path) -> None:
    """Write a page; it appears complete or not at all."""
    write_file(path, page.encode("utf-8"), "the report")
