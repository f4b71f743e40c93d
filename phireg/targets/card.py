"""The model card of a Hugging Face directory: README.md, with the front matter that the hub reads.

A card is its owner's to extend. Its last line has the digest of what was written, so that one that
somebody changed is known and never replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CARD = "README.md"

FRONT_MATTER = 2**16
"""Characters of a card in which its front matter is looked for."""

_SEAL = "<!-- written by phireg, sha256 {} -->\n"
_SEALED = re.compile(r"(.*)<!-- written by phireg, sha256 ([0-9a-f]{64}) -->\n", re.DOTALL)
_HEAD = re.compile(r"\ufeff?---\r?\n(.*?)\r?\n---\s", re.DOTALL)
_LICENSE = re.compile(
    r"""(license|license_name|license_link):[ \t]+(["']?)([\w.:/+?=&%~-]{1,300})\2[ \t]*(?:#.*)?"""
)
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([\w.-]+)")


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card tells."""

    source: Path  # the directory of the model that it was made of
    summary: str  # what the directory is, e.g. the format in a few words
    tags: Sequence[str]  # for the hub
    quantized: bool  # it is a quantization of the base model
    license: Mapping[str, str]  # keys of the source's front matter
    recipe: Sequence[tuple[str, str]]  # label and value
    quality: str | None  # or why that was not measured; None where nothing is quantized
    left: Sequence[str] = ()  # modules that are not quantized

    def render(self) -> str:
        """Return the text of README.md."""
        base = base_model(self.source)
        head: dict[str, object] = dict(self.license)
        if base:
            head["base_model"] = base
            if self.quantized:
                head["base_model_relation"] = "quantized"
        head |= {"pipeline_tag": "text-generation", "tags": list(self.tags)}
        name = base or self.source.name
        rows = [("base model", f"[{base}](https://huggingface.co/{base})" if base else name)]
        blocks = [
            # JSON is YAML, whatever is in the strings.
            "\n".join(
                ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---"]
            ),
            f"# {_cell(name)}, {self.summary}",
            "\n".join(
                ["| | |", "|---|---|"]
                + [f"| {_cell(label)} | {_cell(value)} |" for label, value in (*rows, *self.recipe)]
            ),
        ]
        if self.left:
            blocks.append("Not quantized: " + ", ".join(f"`{name}`" for name in self.left) + ".")
        if self.quality is not None:
            blocks += ["## Quality", self.quality]
        text = "\n\n".join(blocks) + "\n\n"
        return text + _SEAL.format(_digest(text))


def is_unchanged(text: str) -> bool:
    """Return whether a card is as phireg wrote it."""
    match = _SEALED.fullmatch(text)
    return match is not None and _digest(match[1]) == match[2]


def license_of(text: str) -> dict[str, str]:
    """Return the license in the front matter of a card, by the hub's keys."""
    head = _HEAD.match(text[:FRONT_MATTER])
    lines = head[1].splitlines() if head else []
    return {match[1]: match[3] for line in lines if (match := _LICENSE.fullmatch(line))}


def base_model(directory: Path) -> str | None:
    """Return the hub's name of a model that lies in a cache of the hub, None for any other."""
    match = _SNAPSHOT.fullmatch("/".join(directory.absolute().parts[-3:]))
    return f"{match[1]}/{match[2]}" if match else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
