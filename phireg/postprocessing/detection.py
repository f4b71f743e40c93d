"""Decide whether the rows of a checkpoint are in the right order, from everything that tells.

The rows decide before the manifest, it before the producer. Quantized rows are brought back to
numbers and compared with the source's, smoothed as they were: the distance of a row to its own
source row is the rounding error, and to any other row it is large. Each row votes for the orders
whose source row it fits; a row that fits several says nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phireg.checkpoint.manifest import read_manifest
from phireg.checkpoint.rankfiles import RankFile, RankFiles
from phireg.dtypes import BITS, float32_values
from phireg.errors import CheckError, SourceError, UsageError
from phireg.files.kinds import MANIFEST
from phireg.planning.model import Plan, Rows
from phireg.postprocessing.orders import (
    BLOCK,
    REPAIRABLE,
    RIGHT,
    SIZES,
    TEXTS,
    LinearOrders,
    quantization_of,
)
from phireg.reader.architectures import ARCHITECTURES
from phireg.source.model import Reader
from phireg.source.tensors import SourceTensor

Floats = npt.NDArray[np.float32]

IN_SOURCE_ORDER = "--in-source-order"

_REGROUPS_SINCE = (0, 13)
"""The modelopt release that knows decoder ``phi3small`` and puts its rows into the right order;
before, Phi-3-small was exported as decoder ``phi``, whose rows are left as they are."""

_SAMPLE = {"weight": 48, "bias": 256}
"""Rows compared in each rank file, spread evenly over those that tell orders apart."""

_FITS = {"weight": 0.25, "bias": 2**-6}
"""Largest distance of a row to its own source row, relative to its length: more than rounding to
e4m3 or int8 (a bias: to 16 bits) makes, less than there is to another row."""

_SHARE, _FEWEST = 0.9, 4
"""Of the rows that fit one order only, the share and the number that must agree at least."""

_COARSE = {"F8_E4M3": 0.125, "I8": 24.0}
"""A quantized row whose largest element is below this is mostly rounding error."""

_NONE = "none"  # of the orders


@dataclass(frozen=True, slots=True)
class Evidence:
    """A statement about the order."""

    right: bool | None  # None if it cannot tell
    text: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The order of the rows: ``right``, ``block`` or ``parts``; the deciding evidence first."""

    order: str
    evidence: tuple[Evidence, ...]


def decide(
    directory: Path,
    config: Mapping[str, Any],
    files: RankFiles,
    linears: tuple[LinearOrders, ...],
    plan: Plan | None,
    *,
    stated: bool,
) -> Decision:
    """Weigh the evidence for an order of the rows of ``linears``, of which there is at least one.

    ``plan`` is of the source, if it was given; ``stated``: the user says that the rows are in its
    order.
    """
    manifest = _from_manifest(directory, files, linears)
    order, rows = _compare_rows(files, linears, plan, config) if plan else (None, None)
    if rows and manifest and rows.right is False:
        raise CheckError(
            f"the evidence is contradictory: {rows.text}; but {manifest.text}",
            hint="is --model-dir the model that the checkpoint was made from?",
        )
    producer = _from_producer(config)
    evidence = [item for item in (rows, manifest, producer) if item]
    decisive = next((item for item in evidence if item.right is not None), None)
    if stated and decisive and decisive.right:
        raise UsageError(f"{IN_SOURCE_ORDER} is not so: {decisive.text}", hint="leave it out.")
    if decisive is None and stated:
        decisive = Evidence(False, f"{IN_SOURCE_ORDER} was given")
    if decisive is None:
        seen = "".join(f"\n  {item.text}" for item in evidence)
        raise UsageError(
            f"nothing in {directory} tells whether its rows are in the source's order{seen}",
            hint="give the model it was made from with --model-dir, or state it: "
            f"{IN_SOURCE_ORDER}.",
        )
    ordered = (decisive, *(item for item in evidence if item is not decisive))
    if decisive.right:
        return Decision(RIGHT, ordered)
    if order is not None:
        return Decision(order, ordered)
    if len(files) > 1:
        raise UsageError(
            f"the rows are in the source's order ({decisive.text}), but how they were cut over "
            f"{len(files)} ranks is not known",
            hint="give the model it was made from with --model-dir: its rows tell.",
        )
    if decisive is producer:
        text = "postprocess_quant_checkpoint.py leaves no mark: if it may have been run, "
        ordered += (Evidence(None, f"{text}--model-dir tells"),)
    return Decision(BLOCK, ordered)


def check_source(config: Mapping[str, Any], plan: Plan) -> None:
    """Refuse a source that has errors, or another architecture or size than the checkpoint."""
    if plan.errors:
        first = plan.errors[0]
        raise SourceError(f"{plan.source.directory}: {first.subject} {first.detail}")
    for key in ("architecture", *SIZES):
        value, planned = config.get(key), plan.config.get(key)
        if value is not None and planned is not None and value != planned:
            raise SourceError(
                f"{plan.source.directory} is not the source of this checkpoint: {key} is "
                f"{planned!r}, in the checkpoint {value!r}",
                hint="give the model that this checkpoint was made from.",
            )


def _from_manifest(
    directory: Path, files: RankFiles, linears: Iterable[LinearOrders]
) -> Evidence | None:
    """Read phireg.json, of the files it has digests of: phireg never leaves the source's order."""
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    producer = manifest.get("producer")
    if not isinstance(producer, Mapping) or producer.get("name") != "phireg":
        return None
    for file in files.values():
        record = manifest["files"].get(file.path.name)
        digests = record.get("tensors") if isinstance(record, Mapping) else None
        for linear in (orders.linear for orders in linears):
            for name in (f"{linear}.{companion}" for companion in file.module(linear)):
                if not isinstance(digests, Mapping) or digests.get(name) != file.digest(name):
                    raise CheckError(
                        f"{directory / MANIFEST} says that phireg wrote this checkpoint, but "
                        f"{file.path.name} holds another {name}",
                        hint=f"if you replaced the rank files, move {MANIFEST} away.",
                    )
    action = "post-processed" if "postprocess" in manifest else "wrote"
    return Evidence(True, f"{MANIFEST}: phireg {producer.get('version')} {action} this checkpoint")


def _from_producer(config: Mapping[str, Any]) -> Evidence | None:
    """Judge modelopt's version and decoder type; known for Phi-3-small only."""
    producer = config.get("producer")
    row = ARCHITECTURES.get(str(config.get("architecture")))
    if row is None or not row.block_sparse or not isinstance(producer, Mapping):
        return None
    version = producer.get("version")
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if producer.get("name") != "modelopt" or numbers is None:
        return None
    early = (int(numbers[1]), int(numbers[2])) < _REGROUPS_SINCE
    decoder = config.get("decoder", "phi" if early else "phi3small")
    writer = f"config.json: modelopt {version} wrote it as decoder '{decoder}'"
    if early and decoder == "phi":
        return Evidence(False, f"{writer}, which leaves the rows of qkv grouped by KV head")
    if not early and decoder == "phi3small":
        return Evidence(True, f"{writer}, which puts the rows of qkv into the right order")
    return Evidence(None, f"{writer}, which is not known to fit together")


def _compare_rows(
    files: RankFiles, linears: Iterable[LinearOrders], plan: Plan, config: Mapping[str, Any]
) -> tuple[str | None, Evidence]:
    """Compare some rows with the source's at TP 1; the order is None if they do not tell."""
    fp8 = quantization_of(config) == "FP8"
    tensors: dict[str, list[str]] = {}  # by the order that their rows vote for
    compared = 0
    with plan.source.open() as reader:
        for orders in linears:
            for companion in _SAMPLE:
                votes = _votes(files, orders, companion, plan, reader, fp8=fp8)
                compared += votes.total()
                if votes:
                    order, count = votes.most_common(1)[0]
                    agreed = order if count >= _SHARE * votes.total() else _NONE
                    tensors.setdefault(agreed, []).append(f"{orders.linear}.{companion}")
    source = plan.source.directory
    if _NONE in tensors:
        raise CheckError(
            f"the rows of {tensors[_NONE][0]} are not those of {source} in any order",
            hint="give the model that this checkpoint was made from.",
        )
    if len(tensors) > 1:
        raise CheckError(
            "the rows are not all in the same order: "
            + "; ".join(f"{len(n)} tensors ({n[0]}) in {TEXTS[o]}" for o, n in tensors.items()),
            hint="no post-processing repairs this: convert or quantize again.",
        )
    if not tensors or compared < _FEWEST:
        return None, Evidence(None, "the rows that were compared are alike in every order")
    (order,) = tensors
    text = f"{compared:,} rows compared with {source}: they are in {TEXTS[order]}"
    if order not in (RIGHT, *REPAIRABLE):
        raise CheckError(
            text, hint="the step was done twice, or without need; convert or quantize again."
        )
    return order, Evidence(order == RIGHT, text)


def _votes(
    files: RankFiles, orders: LinearOrders, companion: str, plan: Plan, reader: Reader, *, fp8: bool
) -> Counter[str]:
    """Count the sampled rows of all ranks that fit one order only, or none."""
    votes: Counter[str] = Counter()
    origins = _origins(plan, orders, companion)
    for rank, file in files.items():
        if not origins or companion not in file.module(orders.linear):
            continue
        first, *others = (order[rank] for order in orders.by_name.values())
        telling = np.flatnonzero(np.any([other != first for other in others], axis=0))
        stored = _StoredRows(file, orders.linear, companion, fp8=fp8)
        for row in telling[:: max(1, len(telling) // _SAMPLE[companion])].tolist():
            values = stored.values(row)
            if values is None:
                continue
            fitting = [
                name
                for name, order in orders.by_name.items()
                if stored.fits(values, _source_row(reader, *origins[int(order[rank][row])]))
            ]
            if len(fitting) < 2:
                votes[fitting[0] if fitting else _NONE] += 1
    return votes


def _origins(
    plan: Plan, orders: LinearOrders, companion: str
) -> dict[int, tuple[SourceTensor, int]]:
    """Map each row number to its source row; empty if the source does not have this tensor."""
    name = f"{orders.linear}.{companion}"
    origin = next((output.origin for output in plan.outputs if output.name == name), None)
    rows = [
        (plan.source.tensors[span.source], row)
        for span in (origin.spans if isinstance(origin, Rows) else ())
        if span.source is not None
        for row in range(span.start, span.stop)
    ]
    # Row i of the right order over one rank is row whole[i] of the source's order.
    if len(rows) != len(orders.whole):
        return {}
    return dict(zip(orders.whole.tolist(), rows, strict=True))


class _StoredRows:
    """Rows of one tensor of a rank file, as numbers."""

    def __init__(self, file: RankFile, linear: str, companion: str, *, fp8: bool) -> None:
        self.file = file
        self.name = f"{linear}.{companion}"
        self.companion = companion
        entry = file.header.entries[self.name]
        self.dtype = "F8_E4M3" if fp8 and entry.dtype == "I8" else entry.dtype
        self.columns = entry.shape[1] if len(entry.shape) > 1 else 1
        is_weight = companion == "weight"
        self.scale = self._vector(f"{linear}.weights_scaling_factor") if is_weight else None
        self.smoothing = self._vector(f"{linear}.prequant_scaling_factor") if is_weight else None

    def _vector(self, name: str) -> Floats | None:
        entry = self.file.header.entries.get(name)
        return None if entry is None else float32_values(self.file.read(name), entry.dtype)

    def values(self, row: int) -> Floats | None:
        """Return a stored row; None if it holds too little to be compared."""
        bits = self.file.read(self.name, row * self.columns, self.columns)
        values = float32_values(bits, self.dtype)
        largest = float(np.abs(values).max(initial=0))
        if not 0 < largest < np.inf or largest < _COARSE.get(self.dtype, 0):
            return None
        if self.scale is not None:
            values = values * self.scale[row if len(self.scale) > 1 else 0]
        return values

    def fits(self, values: Floats, source: Floats) -> bool:
        """Return whether stored values are a source row, but for rounding."""
        if self.smoothing is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                source = source / self.smoothing
        length = float(np.linalg.norm(source))
        distance = float(np.linalg.norm(values - source))
        return length > 0 and distance / length <= _FITS[self.companion]


def _source_row(reader: Reader, tensor: SourceTensor, row: int) -> Floats:
    size = tensor.nbytes // tensor.shape[0]
    raw = bytearray(size)
    reader.read_into(tensor, row * size, memoryview(raw))
    return float32_values(np.frombuffer(raw, BITS[tensor.dtype]), tensor.dtype)
