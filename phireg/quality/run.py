"""Measure a quantized checkpoint that was just written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phireg.calibration.calibrate import describe, encoder
from phireg.calibration.settings import Settings
from phireg.config.hf import HFConfig
from phireg.conversion.stream import assemble
from phireg.data.samples import DEFAULT_SIZE, Encode, Samples, read_samples
from phireg.device import pick_device
from phireg.dtypes import as_torch
from phireg.errors import SourceError
from phireg.executor import Executor, read_spec
from phireg.executor.model import Source, open_ranks
from phireg.files.json import read_json_object
from phireg.planning.build import build_plan
from phireg.planning.model import Plan
from phireg.quality.layerwise import compare_layers
from phireg.quality.result import Quality, TextQuality
from phireg.reader.spec import parse_spec
from phireg.reference.quiet import quiet
from phireg.source.model import Reader

TOKENS = {"cpu": 512, "cuda": 2048}
"""Most tokens of a measurement, by kind of device."""

CPU_BUDGET = 4e12
"""Multiply-adds that a measurement may take on a CPU: about two minutes on a few cores."""

FEWEST = 64
"""Tokens below which nothing is measured unless the user asks for it."""

_FURTHER = 64
"""Samples that are read behind those that were calibrated on."""

Progress = Callable[[int, int], None]
"""Takes the number of further layers, and of all layers."""


def affordable(plan: Plan, device: torch.device) -> int:
    """Return how many tokens both models can run in time."""
    most = TOKENS[device.type]
    if device.type == "cuda":
        return most
    weights = sum(
        tensor.shape[0] * tensor.shape[1]
        for tensor in plan.source.tensors.values()
        if len(tensor.shape) > 1
    )
    return min(most, int(CPU_BUDGET / (2 * weights)))  # each model multiplies every weight once


def measure(
    plan: Plan,
    checkpoint_dir: str | Path,
    settings: Settings,
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Compare a quantized checkpoint with the one that ``convert`` would have written.

    Both run in float32 on the executor, which reads one layer of each at a time: the checkpoint's
    from its files, the unquantized one's from the source. The samples are those of ``settings``
    behind the ones that ``provenance``, of the statistics, tells of.
    """
    device = pick_device(settings.device)
    directory = Path(checkpoint_dir)
    spec = read_spec(directory)
    with quiet():
        text = choose_text(
            settings,
            provenance,
            encoder(plan.source.directory),
            tokens=max(affordable(plan, device), FEWEST),
            vocab_size=spec.vocab_size,
            longest=spec.max_position_embeddings,
        )
    if not text.rows:
        raise SourceError(
            f"{text.origin}: no sample has two tokens or more, so nothing can be measured"
        )
    hf = HFConfig(read_json_object(plan.source.directory / "config.json"))
    options = dataclasses.replace(plan.options, qformat=None, kv_cache_dtype=None)
    unquantized = build_plan(plan.chosen, hf, plan.source, options, plan.model_dir)
    report = progress or (lambda more, total: None)
    with plan.source.open() as reader:
        ranks = range(spec.tp_size)
        how: dict[str, Any] = {"device": device, "dtype": torch.float32, "offload": True}
        sources = [_planned_tensors(unquantized, rank, reader) for rank in ranks]
        plain = Executor(parse_spec(dict(unquantized.config)), sources, ranks, **how)
        quantized = Executor(spec, open_ranks(directory, spec, ranks), ranks, **how)
        layers = spec.num_layers
        linears, hidden, logits = compare_layers(
            plain, quantized, text.rows, lambda more: report(more, layers)
        )
    assert plan.options.qformat is not None
    tokens = sum(map(len, text.rows))
    text_quality = TextQuality(text.origin, len(text.rows), tokens, text.calibrated, *logits)
    labels = {
        "checkpoint": str(directory.absolute()),
        "source": f"{plan.model_dir}, {len(plan.source.files)} file(s)",
    }
    if provenance is not None:
        labels["calibration"] = describe(provenance)
    labels["text"] = text_quality.description
    labels["computed"] = f"in float32 on {device}, torch {torch.__version__}"
    return Quality(
        str(checkpoint_dir),
        plan.family,
        plan.options.qformat,
        plan.options.kv_cache_dtype,
        spec.architecture.name,
        plan.options.dtype,
        plan.options.tp_size,
        linears,
        hidden,
        text_quality,
        tuple(labels.items()),
    )


@dataclass(frozen=True, slots=True)
class Text:
    """The text to measure on; ``calibrated`` if the statistics were taken from the same samples."""

    rows: tuple[tuple[int, ...], ...]
    origin: str
    calibrated: bool


def choose_text(
    settings: Settings,
    provenance: Mapping[str, Any] | None,
    encode: Encode,
    *,
    tokens: int,
    vocab_size: int,
    longest: int,
) -> Text:
    """Choose the samples behind those of the calibration, or the first ones if there are none."""

    def read(size: int | None) -> Samples:
        length = min(settings.max_length, longest)
        return read_samples(
            settings.source, encode, size=size, max_length=length, vocab_size=vocab_size
        )

    samples = read(None)
    used = 0
    if provenance is not None:
        used = int(provenance["samples"])
        if used >= DEFAULT_SIZE:
            samples = Samples(read(used + _FURTHER).rows, samples.origin)
        if samples.first(used).digest != provenance["data_digest"]:
            used = 0  # statistics of other text
    further = [row for row in samples.rows[used:] if len(row) > 1]
    rows: list[tuple[int, ...]] = []
    for row in further or samples.rows:
        kept = row[: tokens - sum(map(len, rows))]
        if len(kept) < 2:
            break
        rows.append(kept)
    return Text(tuple(rows), samples.origin, used > 0 and not further)


def _planned_tensors(plan: Plan, rank: int, reader: Reader) -> Source:
    """Return a function from a tensor's name to the tensor that the plan would write."""
    outputs = {output.name: output for output in plan.outputs if output.rank == rank}

    def read(name: str) -> Tensor:
        output = outputs[name]
        tensor: Tensor = as_torch(assemble(plan, output, reader), output.dtype)
        return tensor.reshape(output.shape)

    return read
