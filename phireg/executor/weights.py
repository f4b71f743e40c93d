"""The mapped rank files, held against what a spec expects of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from phireg.checkpoint.rankfiles import RankFile, RankFiles
from phireg.errors import CheckError
from phireg.reader.spec import ModelSpec
from phireg.reader.tensors import (
    KEY_SCALE,
    KV_SCALE,
    VALUE_SCALE,
    Expected,
    is_scale,
    optional_rank_tensors,
    rank_tensors,
    replicated,
)

# Reads one tensor of one rank by its name in the file.
Source: TypeAlias = Callable[[str], Tensor]

# Rotary tables TensorRT-LLM 0.12 and later writes at the root and computes again when it loads.
_ROTARY_TABLES = re.compile(
    r"(long_rope_)?(embed_positions\w*|rotary_inv_freq)|(short|long)_inv_freq"
)


def open_ranks(checkpoint_dir: Path, spec: ModelSpec, ranks: Sequence[int]) -> list[Source]:
    """Map the rank files and hold them against the spec.

    Args:
        checkpoint_dir: directory of config.json and rank*.safetensors.
        spec: what config.json says.
        ranks: the ranks to open. When it is all of them there must be no further rank file, and
            the tensors that every rank repeats must be equal.

    Returns:
        For each rank a function from a tensor's name to the tensor, mapped, on the CPU. Tensors
        have the expected shape and dtype: e4m3 weights stored as int8 are viewed as e4m3, a scale
        without dimensions has one, and the cache's scale is there even if the file has only the
        keys' and the values' (TensorRT-LLM 1.x then takes the larger one, too).

    Raises:
        CheckError: lists every file that is missing or extra, and every tensor that is missing,
            unknown, of another shape or dtype, not the same on all ranks, or a scale that is not
            a finite positive normal number.
    """
    problems: list[str] = []
    files = {rank: checkpoint_dir / f"rank{rank}.safetensors" for rank in ranks}
    if len(ranks) == spec.tp_size:
        found = set(checkpoint_dir.glob("rank*.safetensors"))
        problems += [
            f"{path.name}: config.json has only {spec.tp_size} rank(s)"
            for path in sorted(found - set(files.values()))
        ]
    with RankFiles(checkpoint_dir, ranks) as opened_files:
        problems += [error.message for error in opened_files.errors.values()]
        opened = {rank: _RankFile(file, spec) for rank, file in opened_files.items()}
        for rank, checked in opened.items():
            problems += [f"{files[rank].name}: {problem}" for problem in checked.problems()]
    if not problems:
        problems += _differences(opened, spec)
    if problems:
        raise CheckError(
            f"{checkpoint_dir}: the rank files are not what config.json says:\n  "
            + "\n  ".join(problems),
            hint="convert the model again; a checkpoint is not meant to be edited by hand",
        )
    return [file.tensor for file in opened.values()]


class _RankFile:
    """One mapped file."""

    def __init__(self, file: RankFile, spec: ModelSpec) -> None:
        self._tensor = file.mapped()
        self._present = set(file.header.entries)
        self._required = rank_tensors(spec)
        self._optional = optional_rank_tensors(spec)

    def tensor(self, name: str) -> Tensor:
        """A required tensor as it is expected, or a cache scale made of the keys' and values'."""
        if name not in self._present:
            return torch.maximum(*(self.tensor(part) for part in _parts(name)))
        expected = self._required.get(name) or self._optional[name]
        tensor: Tensor = self._tensor(name)
        if tensor.dtype == expected.stored:
            tensor = tensor.view(expected.dtype)
        return tensor.reshape(expected.shape)

    def problems(self) -> list[str]:
        ready_made = sorted(n for n in self._present if n.endswith(".per_channel_scale"))
        if ready_made:
            return [
                f"{ready_made[0]} belongs to weights that were quantized and rearranged for the "
                "GPU of the machine that made the file, and the file does not say which one"
            ]
        problems = [f"{name} is missing" for name in self._required if not self._has_or_makes(name)]
        for name in sorted(self._present):
            expected = self._required.get(name) or self._optional.get(name)
            if expected is not None:
                problems += self._differs(name, expected) or self._unusable(name)
            elif not _ROTARY_TABLES.fullmatch(name):
                problems.append(f"{name} is not a tensor of this architecture")
        return problems

    def _has_or_makes(self, name: str) -> bool:
        parts = _parts(name)
        return name in self._present or (bool(parts) and self._present.issuperset(parts))

    def _differs(self, name: str, expected: Expected) -> list[str]:
        tensor, problems = self._tensor(name), []
        shape = tuple(tensor.shape)
        if shape != expected.shape and (shape, expected.shape) != ((), (1,)):
            problems.append(f"{name} has the shape {list(shape)}, not {list(expected.shape)}")
        if tensor.dtype not in (expected.dtype, expected.stored):
            problems.append(f"{name} is {tensor.dtype}, not {expected.dtype}".replace("torch.", ""))
        return problems

    def _unusable(self, name: str) -> list[str]:
        """What is wrong with a scale: dividing by it must give numbers, on any device."""
        if not is_scale(name):
            return []
        values = self.tensor(name)
        bad = ~(values.isfinite() & (values >= torch.finfo(values.dtype).tiny))
        if not bad.any():
            return []
        first = int(bad.nonzero()[0])
        place = f"{int(bad.sum())} of {len(values)} values, the first at {first}: "
        return [
            f"{name} is no scale ({place if len(values) > 1 else ''}{float(values[first]):g} "
            "is not a finite positive normal number)"
        ]


def _parts(name: str) -> list[str]:
    """The scales a cache's scale can be made of."""
    prefix, found, _ = name.rpartition(KV_SCALE)
    return [prefix + KEY_SCALE, prefix + VALUE_SCALE] if found else []


def _differences(opened: dict[int, _RankFile], spec: ModelSpec) -> list[str]:
    """Names of replicated tensors that some rank has other values of.

    The ranks run in lockstep on one copy of the hidden states, which is right only while what
    every rank repeats is the same everywhere.
    """
    files = iter(opened.items())
    _, first = next(files)
    weights = spec.quantization.weights
    names = [name for name in rank_tensors(spec) if replicated(name, weights)]
    return [
        f"rank{rank}.safetensors: {name} differs from the first rank's"
        for rank, file in files
        for name in names
        if not torch.equal(
            first.tensor(name).view(torch.uint8), file.tensor(name).view(torch.uint8)
        )
    ]
