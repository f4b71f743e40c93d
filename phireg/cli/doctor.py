"""``phireg doctor``: report which features this environment supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from phireg.cli.help import documented
from phireg.cli.options import json_option
from phireg.cli.output import ProgressBars, Styled, columns, emit, emit_json, printable

if TYPE_CHECKING:
    from phireg.doctor import Ability, Part


@documented("phireg doctor", "phireg doctor --json", page="gpu-host.md", waits="looking around")
@json_option
def command(as_json: bool) -> None:
    """Tell what works here, what a missing part prevents, and what installs it.

    Ends with 0 whatever is missing: it only tells.
    """
    from phireg.doctor import abilities, examine

    with ProgressBars() as bars:
        parts = examine(lambda name: bars.spinner(f"looking at {name}"))
    if as_json:
        works = [{**asdict(ability), "works": not ability.lacks} for ability in abilities(parts)]
        emit_json({"works": works, "parts": [asdict(part) for part in parts]})
    else:
        emit(f"works here\n{_works(abilities(parts))}\n\n{_text(parts)}", styled=True)


def _works(abilities: Sequence[Ability]) -> str:
    rows = []
    for ability in abilities:
        verdict = Styled("no", fg="yellow") if ability.lacks else Styled("yes", fg="green")
        lacks = f": lacks {', '.join(ability.lacks)}" if ability.lacks else ""
        rows.append((verdict, f"{ability.name}{lacks}"))
    return columns(rows, indent=2)


def _text(parts: Sequence[Part]) -> str:
    found = [(part.name, part.state, printable(part.found)) for part in parts]
    blocks = [f"found\n{columns(found, indent=2)}"]
    for part in parts:
        if part.prevents is not None:
            about = [("prevents", part.prevents), ("remedy", printable(part.remedy or ""))]
            blocks.append(f"{part.name} ({part.state})\n{columns(about, indent=2)}")
    return "\n\n".join(blocks)
