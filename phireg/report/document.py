"""A whole page, and writing it so that it is complete or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from html import escape
from pathlib import Path

from phireg.errors import OutputError
from phireg.report.style import CSS


def document(title: str, body: Iterable[str], css: str = "") -> str:
    """A page as text.

    Args:
        title: plain text.
        body: HTML, section by section.
        css: style of the page's own, beside that of all pages.
    """
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{CSS}{css}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def write_page(page: str, path: Path) -> None:
    """Write a page; it appears complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise OutputError(f"{path}: the report cannot be written: {error.strerror}") from error
