"""What a model directory may be read as, and what the user chose where that is more than one.

Every reading is collected before anything is planned. Equal bytes settle a question with a note;
what only the user can know is an error that names each reading, what follows from it, and the
option that chooses it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

from phireg.errors import SourceError, UsageError, check_known
from phireg.files.kinds import WEIGHTS, kind_of_entries
from phireg.files.regular import listed
from phireg.findings import Finding, Severity
from phireg.source.adapter import CONFIG as ADAPTER_CONFIG
from phireg.source.adapter import WEIGHTS as ADAPTER_WEIGHTS
from phireg.source.adapter import Adapter, read_adapter
from phireg.source.model import FORMATS, INDEX, Reader, Source, list_shards, read_index, same_bytes
from phireg.source.tensors import SourceTensor, WeightsFile

ADAPTER = ("merge", "ignore")
"""What to do with a LoRA adapter that lies beside full weights."""

_PREFERRED = tuple(name for file in WEIGHTS for name in (file, f"{file}{INDEX}"))
"""Names of weight sets, in the order in which transformers looks for them."""

_ORIGINALS = ("consolidated.safetensors", "consolidated.pth", "consolidated.00.pth")
"""Names under which original authors save weights; they are read only if the user names them."""

_MOST_FOLDERS = 1000
_SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class Readings:
    """The user's choices; None where the directory has to be unambiguous."""

    weights: str | None = None  # name of a weights file or of an index in the directory
    adapter: str | None = None  # one of ADAPTER
    tie: bool | None = None  # whether lm_head is the embedding

    def __post_init__(self) -> None:
        if self.adapter is not None:
            check_known("reading of an adapter", self.adapter, ADAPTER)

    @classmethod
    def recorded(cls, manifest: Mapping[str, Any] | None) -> Readings:
        """Return the choices that a checkpoint's manifest records."""
        options = (manifest or {}).get("options")
        block = options.get("readings") if isinstance(options, Mapping) else None
        values = block if isinstance(block, Mapping) else {}
        weights, adapter, tie = (values.get(key) for key in ("weights", "adapter", "tie"))
        return cls(
            weights if isinstance(weights, str) else None,
            adapter if adapter in ADAPTER else None,
            tie if isinstance(tie, bool) else None,
        )

    def over(self, other: Readings) -> Readings:
        """Return these choices, and those of ``other`` where there is none."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Readings(*(own if own is not None else others for own, others in pairs))


NO_CHOICE = Readings()


@dataclass(frozen=True, slots=True)
class WeightSet:
    """One set of weights in a directory: a file, or an index with its shards."""

    name: str  # of the file or the index
    directory: Path
    files: tuple[WeightsFile, ...]
    total_size: int | None = None  # that the index states

    @property
    def tensors(self) -> dict[str, SourceTensor]:
        """All tensors by name, by file and by place in the file."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def aliases(self) -> dict[str, SourceTensor]:
        """Other names of tensors, which safetensors' save_model writes into the metadata."""
        tensors = self.tensors
        return {
            name: replace(tensors[kept], name=name)
            for file in self.files
            for name, kept in file.metadata.items()
            if kept in tensors and name not in tensors
        }

    def open(self) -> Reader:
        """Return a reader of the tensors' bytes."""
        return Reader(self.directory, self.files)

    def describe(self) -> str:
        """Return what reading it would read."""
        written = max(file.stamp.mtime_ns for file in self.files) / 1e9
        date = datetime.fromtimestamp(written, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{len(self.tensors)} tensors of {files}, written {date}"


def open_source(
    directory: Path, revision: str | None = None, readings: Readings = NO_CHOICE
) -> Source:
    """Find the weights of a model directory, read every header, and check that all agrees.

    No tensor data is read unless two sets of weights have to be compared, and torch is imported
    for .bin files only. What the user must choose is an error among the source's findings; then
    the source is what transformers would read. All disagreements of an index and its files come
    in one SourceError.
    """
    names = _entries(directory)
    findings: list[Finding] = []
    chosen, *others = _choose(directory, names, readings.weights, findings)
    tensors = chosen.tensors
    if not tensors:
        raise SourceError(f"{directory / chosen.name}: the file holds no tensors")
    findings += _notes(names, chosen, others)
    adapter = _adapter(directory, names, readings.adapter, findings)
    return Source(
        directory,
        MappingProxyType(tensors),
        chosen.files,
        revision,
        tuple(findings),
        adapter,
        chosen.aliases,
    )


def finding(severity: Severity, subject: str, detail: str) -> Finding:
    """Return a finding on a reading."""
    return Finding(severity, "reading", subject, detail)


# Sets of weights


def _choose(
    directory: Path, names: Collection[str], weights: str | None, findings: list[Finding]
) -> list[WeightSet]:
    """Return the set to read, and the others."""
    if weights is not None:
        return [_named_set(directory, names, weights)]
    candidates = [name for name in _PREFERRED if name in names]
    if not candidates:
        raise _no_weights(directory, names)
    if len(candidates) > 1:
        candidates = _without_stale(directory, candidates, findings)
    candidates += [name for name in _ORIGINALS if name in names]
    if len(candidates) == 1:
        return [_read_set(directory, candidates[0])]
    sets: list[WeightSet] = []
    defects: dict[str, SourceError] = {}
    for name in candidates:
        try:
            sets.append(_read_set(directory, name))
        except SourceError as error:
            defects[name] = error
    if not sets:
        raise next(iter(defects.values()))
    first, *others = sets
    differences = {other.name: _difference(first, other) for other in others}
    if defects or any(differences.values()):
        findings.append(_ambiguous(sets, defects, differences))
    else:
        findings += [
            finding(
                Severity.NOTE,
                other.name,
                f"holds the tensors of {first.name}, byte for byte, and is not read",
            )
            for other in others
        ]
    return sets


def _named_set(directory: Path, names: Collection[str], name: str) -> WeightSet:
    known = name in names and Path(name.removesuffix(INDEX)).suffix in FORMATS
    if not known or os.sep in name:
        sets = [each for each in names if each in (*_PREFERRED, *_ORIGINALS)]
        files = sets or _weight_files(names)
        raise UsageError(
            f"--weights {name}: {directory} has no weights file or index of that name",
            hint=f"it has {listed(sorted(files))}." if files else "it has no weights.",
        )
    return _read_set(directory, name)


def _read_set(directory: Path, name: str) -> WeightSet:
    if name.endswith(INDEX):
        index, files = list_shards(directory, name)
        return WeightSet(name, directory, tuple(files), index.total_size)
    return WeightSet(name, directory, (FORMATS[Path(name).suffix](directory, name),))


def _without_stale(directory: Path, candidates: list[str], findings: list[Finding]) -> list[str]:
    """Leave out indices none of whose shards exist; one is kept if there is nothing else."""
    kept = []
    for name in candidates:
        if name.endswith(INDEX):
            try:
                index = read_index(directory / name)
            except SourceError:
                kept.append(name)
                continue
            if len(index.missing) == len(index.shards):
                detail = "none of its shards is there: it is left from other weights, and not used"
                findings.append(finding(Severity.WARNING, name, detail))
                continue
        kept.append(name)
    return kept or candidates[:1]


def _ambiguous(
    sets: list[WeightSet], defects: Mapping[str, SourceError], differences: Mapping[str, str]
) -> Finding:
    first = sets[0]
    reasons = [f"{name} {difference}" for name, difference in differences.items() if difference]
    reasons += [f"{name} cannot be read" for name in defects]
    preferred = next((name for name in _PREFERRED if name in {s.name for s in sets}), None)
    choices = []
    for each in sets:
        loaded = ", which is what transformers loads" if each.name == preferred else ""
        choices.append(f"--weights {each.name} reads {each.describe()}{loaded}")
    choices += [f"{name} is no choice: {e.message.splitlines()[0]}" for name, e in defects.items()]
    detail = (
        f"the directory holds {len(sets) + len(defects)} sets of weights, and they differ from "
        f"{first.name}: {'; '.join(reasons)}. Choose one: {'; '.join(choices)}; or move the others "
        "away"
    )
    return finding(Severity.ERROR, "weights", detail)


def _difference(first: WeightSet, other: WeightSet) -> str:
    """Return how another set differs; an empty text if its tensors are the same bytes."""
    ours, theirs = first.tensors | first.aliases, other.tensors | other.aliases
    if absent := [name for name in ours if name not in theirs]:
        return f"lacks {listed(absent, 2)}"
    if more := [name for name in theirs if name not in ours]:
        return f"has {listed(more, 2)} as well"
    for name, tensor in ours.items():
        if (tensor.dtype, tensor.shape) != (theirs[name].dtype, theirs[name].shape):
            return f"has another dtype or shape of {name}"
    pairs = [(tensor, theirs[name]) for name, tensor in ours.items()]
    with first.open() as reader, other.open() as second:
        for limit in (_SAMPLE, None):  # trained weights differ everywhere: a sample shows it
            for left, right in pairs:
                if not same_bytes(reader, left, second, right, limit):
                    return f"has other values in {left.name}"
    return ""


def _notes(names: Collection[str], chosen: WeightSet, others: list[WeightSet]) -> list[Finding]:
    used = {file.name for each in (chosen, *others) for file in each.files}
    known = {name for name in names if name in (*_PREFERRED, *_ORIGINALS)}
    strays = [
        name
        for name in _weight_files(names)
        if name not in used and name not in known and not name.startswith("adapter_")
    ]
    notes = []
    if strays:
        detail = f"does not name these files, which are not read: {listed(strays)}"
        notes.append(finding(Severity.NOTE, chosen.name, detail))
    total = sum(tensor.nbytes for file in chosen.files for tensor in file.tensors)
    if chosen.total_size not in (None, total):
        detail = f"says {chosen.total_size} bytes in total, the tensors have {total}"
        notes.append(finding(Severity.NOTE, chosen.name, detail))
    return notes


# An adapter beside full weights


def _adapter(
    directory: Path, names: Collection[str], choice: str | None, findings: list[Finding]
) -> Adapter | None:
    """Return the adapter to merge, if that is chosen."""
    name = next((file for file in ADAPTER_WEIGHTS if file in names), None)
    if name is None or choice == "ignore":
        if choice == "merge":
            detail = f"--adapter merge was chosen, and the directory has no {ADAPTER_WEIGHTS[0]}"
            findings.append(finding(Severity.ERROR, "adapter", detail))
        elif name is not None:
            findings.append(finding(Severity.NOTE, name, "a LoRA adapter that is not applied"))
        elif ADAPTER_CONFIG in names:
            detail = "the config of an adapter whose weights are not here: nothing is applied"
            findings.append(finding(Severity.NOTE, ADAPTER_CONFIG, detail))
        return None
    if ADAPTER_CONFIG not in names:
        detail = (
            f"a LoRA adapter lies beside full weights without its {ADAPTER_CONFIG}, so it cannot "
            "be merged: add that file, or choose --adapter ignore if it is part of the weights "
            "already"
        )
        findings.append(finding(Severity.ERROR, name, detail))
        return None
    if choice == "merge":
        return read_adapter(directory, name)
    detail = (
        "a LoRA adapter lies beside full weights; transformers applies it where peft is installed. "
        "Choose: --adapter merge adds it to the weights, right if they are the base model's; "
        "--adapter ignore takes them as they are, right if it is part of them already; or move "
        "the adapter's files away"
    )
    findings.append(finding(Severity.ERROR, name, detail))
    return None


def _no_weights(directory: Path, names: Collection[str]) -> SourceError:
    kind, name = kind_of_entries(names)
    inside = _models_inside(directory, names)
    if kind is not None:
        hint = kind.advice + (f": {listed(inside)}" if inside else "")
        return SourceError(f"{directory}: this is {kind.name} ({name})", hint=hint)
    if inside:
        return SourceError(
            f"{directory}: the weights are not here but in a folder of it: {listed(inside)}",
            hint="give that folder, if it holds the model's config.json as well.",
        )
    others = _weight_files(names)
    if others:
        return SourceError(
            f"{directory}: no weights under a name that is known here, only {listed(others)}",
            hint=f"if that is the model, name it: --weights {others[0]}",
        )
    content = "there are no weights in this directory" if names else "the directory is empty"
    return SourceError(
        f"{directory}: {content}",
        hint="expected config.json and model.safetensors, model.safetensors.index.json with its "
        "shards, or the same as pytorch_model.bin",
    )


def _models_inside(directory: Path, names: Collection[str]) -> list[str]:
    """Return the folders of a directory that have weights, the last first."""
    folders = sorted(names, key=lambda name: (len(name), name), reverse=True)[:_MOST_FOLDERS]
    return [
        str(directory / name)
        for name in folders
        if any(os.access(directory / name / file, os.F_OK) for file in _PREFERRED)
    ]


def _weight_files(names: Collection[str]) -> list[str]:
    """Names that end like weights files, sorted, without those of a trainer's own state."""
    return sorted(
        name
        for name in names
        if name.endswith((*FORMATS, ".ckpt"))
        and not name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))
    )


def _entries(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))  # noqa: PTH208 - names only
    except FileNotFoundError:
        raise SourceError(f"{directory}: no such directory") from None
    except NotADirectoryError:
        raise SourceError(
            f"{directory}: this is a file; a model is a directory",
            hint="give the directory that holds config.json and the weights",
        ) from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{str(directory)!r}: cannot be read: {error}") from None
