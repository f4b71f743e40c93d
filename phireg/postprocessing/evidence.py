"""What a checkpoint's own files say about the order of its rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from phireg.checkpoint.manifest import MANIFEST, read_manifest
from phireg.errors import CheckError
from phireg.postprocessing.orders import Orders
from phireg.postprocessing.ranks import Ranks

_BLOCK = 4 * 1024 * 1024
_REGROUPS_SINCE = (0, 13)
"""The modelopt release that knows decoder ``phi3small`` and puts its rows into the right order;
before, Phi-3-small was exported as decoder ``phi``, whose rows are left as they are."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that tells the order.

    Attributes:
        source: ``manifest``, ``producer``, ``rows`` or ``stated``.
        right: whether it says that the order is the right one; None if it cannot tell.
        text: for people.
    """

    source: str
    right: bool | None
    text: str


def from_manifest(directory: Path, ranks: Ranks, orders: Iterable[Orders]) -> Evidence | None:
    """What phireg.json says: phireg itself never leaves the source's order.

    It counts as far as the files are those it has digests of.

    Raises:
        SourceError: the manifest is damaged.
        CheckError: the rows are not those that the manifest has digests of.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    producer = manifest.get("producer")
    if not isinstance(producer, Mapping) or producer.get("name") != "phireg":
        return None
    for rank, path in enumerate(ranks.paths):
        record = manifest["files"].get(path.name)
        digests = record.get("tensors") if isinstance(record, Mapping) else None
        for target in (order.target for order in orders):
            for companion, entry in ranks.companions(rank, target).items():
                name = f"{target}.{companion}"
                written = digests.get(name) if isinstance(digests, Mapping) else None
                if written != _digest(ranks, rank, entry.start, entry.nbytes):
                    raise CheckError(
                        f"{directory / MANIFEST} says that phireg wrote this checkpoint, but "
                        f"{path.name} holds another {name}",
                        hint=f"if you replaced the rank files, move {MANIFEST} away.",
                    )
    done = "post-processed" if "postprocess" in manifest else "wrote"
    return Evidence(
        "manifest", True, f"{MANIFEST}: phireg {producer.get('version')} {done} this checkpoint"
    )


def _digest(ranks: Ranks, rank: int, start: int, count: int) -> str:
    hashed = xxhash.xxh3_128()
    for done in range(0, count, _BLOCK):
        hashed.update(ranks.read(rank, start + done, min(_BLOCK, count - done)))
    return hashed.hexdigest()


def from_producer(config: Mapping[str, Any]) -> Evidence | None:
    """What modelopt's version and decoder type say about Phi-3-small, if they are there."""
    producer = config.get("producer")
    if config.get("architecture") != "Phi3SmallForCausalLM" or not isinstance(producer, Mapping):
        return None
    name, version = producer.get("name"), producer.get("version")
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if name != "modelopt" or numbers is None:
        return None
    early = (int(numbers[1]), int(numbers[2])) < _REGROUPS_SINCE
    decoder = config.get("decoder", "phi" if early else "phi3small")
    who = f"config.json: modelopt {version} wrote it as decoder '{decoder}'"
    if early and decoder == "phi":
        return Evidence(
            "producer", False, f"{who}, which leaves the rows of qkv grouped by KV head"
        )
    if not early and decoder == "phi3small":
        return Evidence("producer", True, f"{who}, which puts the rows of qkv into the right order")
    return Evidence("producer", None, f"{who}, which is not known to fit together")
