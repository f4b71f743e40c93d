"""``phireg doctor``: report which features this environment supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from phireg.cli.help import documented
from phireg.cli.options import json_option
from phireg.cli.output import ProgressBars, columns, emit, emit_json

if TYPE_CHECKING:
    from phireg.doctor import Part


@documented(
    "phireg doctor",
    "phireg doctor --json",
    page="gpu-host.md",
)
@json_option
def command(as_json: bool) -> None:
    """Tell what works here, what each missing part prevents, and what installs it.

    Ends with 0 whatever is missing: it only tells.
    """
    from phireg.doctor import examine

    with ProgressBars() as bars:
        parts = examine(lambda name: bars.spinner(f"looking at {name}"))
    if as_json:
        emit_json({"parts": [asdict(part) for part in parts]})
    else:
        emit(_text(parts))


def _text(parts: Sequence[Part]) -> str:
    blocks = [columns([(part.name, part.state, part.found) for part in parts])]
    for part in parts:
        if part.prevents is not None:
            about = [("prevents", part.prevents), ("remedy", part.remedy or "")]
            blocks.append(f"{part.name} ({part.state})\n{columns(about, indent=2)}")
    return "\n\n".join(blocks)
