"""The rank files of a checkpoint as tensors, checked against its config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from phireg.checkpoint.rankfiles import RankFile, RankFiles
from phireg.errors import CheckError
from phireg.reader.spec import ModelSpec
from phireg.reader.structure import tensor_deviations
from phireg.reader.tensors import (
    KEY_SCALE,
    KV_SCALE,
    VALUE_SCALE,
    Kind,
    is_scale,
    optional_tensors,
    rank_tensors,
    replicated,
)

Source: TypeAlias = Callable[[str], Tensor]
"""Reads one tensor of one rank by its name in the file."""


def open_ranks(checkpoint_dir: Path, spec: ModelSpec, ranks: Sequence[int]) -> list[Source]:
    """Map rank files; raise a CheckError that lists every deviation from the spec.

    Deviations are missing and, if ``ranks`` are all, extra files; tensors that are missing,
    unknown, of another shape or dtype, or not equal where all ranks repeat them; and scales that
    are not finite positive normal numbers.

    Tensors stay on the CPU and get the expected shape and dtype: e4m3 weights stored as int8 are
    viewed as e4m3, a scale without dimensions has one, and the cache's scale is there even if the
    file has only the keys' and the values' (TensorRT-LLM 1.x then takes the larger one, too).
    """
    required = rank_tensors(spec)
    accepted = optional_tensors(spec) | required
    sources: dict[int, Source] = {}
    with RankFiles(checkpoint_dir, ranks) as files:
        problems = [error.message for error in files.errors.values()]
        if len(ranks) == spec.tp_size:
            problems += [f"{name}: {text}" for name, text in files.surplus()]
        for rank, file in files.items():
            sources[rank] = _source(file, accepted)
            problems += [
                f"{file.path.name}: {problem}"
                for problem in _rank_problems(file.kinds(), sources[rank], required, accepted)
            ]
    if not problems:
        names = [name for name in required if replicated(spec, name)]
        problems += _differences(sources, names)
    if problems:
        raise CheckError(
            f"{checkpoint_dir}: the rank files are not what config.json says:\n  "
            + "\n  ".join(problems),
            hint="convert the model again; a checkpoint is not meant to be edited by hand",
        )
    return list(sources.values())


def _source(file: RankFile, accepted: Mapping[str, Kind]) -> Source:
    mapped, present = file.mapped(), file.header.entries.keys()

    def stored(name: str) -> Tensor:
        code, shape = accepted[name]
        tensor = mapped(name)
        if (code, tensor.dtype) == ("F8_E4M3", torch.int8):
            tensor = tensor.view(torch.float8_e4m3fn)
        return tensor.reshape(shape)

    def read(name: str) -> Tensor:
        if name not in present:
            return torch.maximum(*map(stored, _cache_scales(name)))
        return stored(name)

    return read


def _cache_scales(name: str) -> list[str]:
    """Return the names of the scales that a cache's scale can be made of."""
    prefix, suffix, _ = name.rpartition(KV_SCALE)
    return [prefix + KEY_SCALE, prefix + VALUE_SCALE] if suffix else []


def _rank_problems(
    tensors: Mapping[str, Kind],
    source: Source,
    required: Mapping[str, Kind],
    accepted: Mapping[str, Kind],
) -> Iterator[str]:
    for name in tensors:
        if name.endswith(".per_channel_scale"):
            yield (
                f"{name} belongs to weights that were quantized and rearranged for the GPU of the "
                "machine that made the file, and the file does not say which one"
            )
            return
    wrong = set()
    for deviation in tensor_deviations(tensors, required, accepted):
        scales = _cache_scales(deviation.name)
        derived = deviation.name not in tensors and scales and tensors.keys() >= set(scales)
        if not deviation.harmless and not derived:
            wrong.add(deviation.name)
            yield f"{deviation.name} {deviation.text}"
    for name in tensors.keys() & accepted.keys() - wrong:
        if not is_scale(name):
            continue
        stored = source(name)
        if defect := scale_defect(stored, torch.finfo(stored.dtype).tiny):
            yield f"{name} {defect}"


def scale_defect(stored: Tensor, least: float) -> str | None:
    """Say why a scale cannot be divided by on every device; None if it is ``least`` or larger."""
    # An e4m3 scale of a group of zeros is zero, and so may be a small one.
    least = 0.0 if stored.dtype == torch.float8_e4m3fn else least
    values = stored.float().flatten()
    bad = ~(values.isfinite() & (values >= least))
    if not bad.any():
        return None
    first = int(bad.nonzero()[0])
    place = f"{int(bad.sum())} of {len(values)} values, the first at {first}: "
    return (
        f"is no scale ({place if len(values) > 1 else ''}{float(values[first]):g} is not a finite "
        "positive normal number)"
    )


def _differences(sources: Mapping[int, Source], names: Sequence[str]) -> Iterator[str]:
    """Yield replicated tensors that differ: ranks in lockstep share one copy of hidden states."""
    (_, first), *others = sources.items()
    for rank, source in others:
        for name in names:
            one, other = (read(name).reshape(-1).view(torch.uint8) for read in (first, source))
            if not torch.equal(one, other):
                yield f"rank{rank}.safetensors: {name} differs from the first rank's"
