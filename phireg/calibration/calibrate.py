"""Calibrating a source model, and reusing the statistics of an earlier calibration."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from phireg.calibration.awq import PASSES
from phireg.calibration.collect import Cost, Progress, collect, measure
from phireg.calibration.settings import Settings
from phireg.calibration.statistics import SUFFIX, Statistics, load, save
from phireg.checkpoint.manifest import file_digest
from phireg.data.row import Content
from phireg.data.samples import Encode, Samples, read_samples
from phireg.device import pick_device, within_memory
from phireg.dtypes import WEIGHT_DTYPES, torch_dtype
from phireg.errors import SourceError, UsageError
from phireg.family import Family
from phireg.files.regular import ANYWHERE
from phireg.files.writing import STATISTICS, check_writable
from phireg.generation.tokenizer import Tokenizer, find_tokenizer
from phireg.planning.model import Plan
from phireg.reference.load import open_reference
from phireg.reference.quiet import quiet
from phireg.source.adapter import CONFIG as ADAPTER_CONFIG
from phireg.source.model import Source
from phireg.source.readings import NO_CHOICE, Readings

CPU_SECONDS = 300.0
"""Longest calibration on a CPU if the number of samples is not given."""

FEWEST = 8
"""Samples that are taken even so."""

_MOST, _LARGEST = 16, 2**28
"""Number and bytes of files that are looked at for statistics that serve."""

Tell = Callable[[str], None]
"""Takes a line of text before the work that it describes begins."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Statistics and the file that keeps them."""

    statistics: Statistics
    file: Path
    reused: bool  # the file existed already


def calibrate(
    plan: Plan,
    file: str | Path,
    settings: Settings,
    *,
    required: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Calibrated:
    """Load statistics from a file if they fit this source, else collect and save them there.

    They are saved at once, so a failed export need not calibrate again, and other formats, dtypes
    and numbers of ranks of the same source need not either: unless the file is required or exists,
    statistics beside it are used if a calibration now would see the same weights and samples.

    Args:
        plan: from :func:`phireg.plan`.
        file: statistics; replaced if they do not fit.
        settings: the samples. Statistics that were made with others do not fit.
        required: a file that exists must fit. It may have been made with other settings, as long
            as ``settings`` has only defaults.
        progress: takes (further tokens through one layer, all of them).
        tell: takes a line on the samples, on their cost, and on why a file does not fit.

    Raises:
        UsageError: the settings make no sense.
        SourceError: the file is damaged, or required and of another source; the model or its
            tokenizer cannot be read; a maximum is not finite.
        OutputError: the file cannot be written.
    """
    path = Path(file)
    report = tell or (lambda line: None)
    search = plan.options.searched
    if os.path.lexists(path):
        statistics = load(path)
        named = required and settings == Settings(
            batch_size=settings.batch_size, device=settings.device
        )
        reason = misfit(statistics, plan.source, None if named else settings, search=search)
        if reason is None and not required:
            with suppress(SourceError):  # an export that failed is continued without a network
                reason = _other_samples(statistics, plan, settings)
        if reason is None:
            report(f"statistics of an earlier calibration serve: {path}")
            return Calibrated(statistics, path, True)
        if required:
            raise SourceError(
                f"{path} does not serve as calibration statistics: {reason}",
                hint="name the file of this model and these settings, or one that does not exist: "
                "it will be written.",
            )
        report(f"{path} does not serve: {reason}")
    elif not required:
        for other in _neighbors(path):
            with suppress(SourceError):
                statistics = load(other)
                if not misfit(
                    statistics, plan.source, settings, search=search
                ) and not _other_samples(statistics, plan, settings):
                    report(f"no calibration: {other} has this model's statistics on these samples")
                    return Calibrated(statistics, other, True)
    check_writable(path, STATISTICS)
    statistics = run_calibration(
        plan.chosen.family,
        plan.source,
        settings,
        readings=plan.options.readings,
        progress=progress,
        tell=tell,
        search=search,
    )
    save(path, statistics)
    return Calibrated(statistics, path, False)


def _neighbors(path: Path) -> list[Path]:
    """Return files of statistics in the same directory, the newest first."""
    with suppress(OSError):
        files = {file: file.stat() for file in path.parent.glob(f"*{SUFFIX}") if file.is_file()}
        small = [file for file, stat in files.items() if stat.st_size <= _LARGEST]
        return sorted(small, key=lambda file: -files[file].st_mtime)[:_MOST]
    return []


def _other_samples(statistics: Statistics, plan: Plan, settings: Settings) -> str | None:
    """Return why a calibration now would see other samples, with the same settings; or None."""
    count, config = statistics.provenance.get("samples"), plan.config
    positions, vocab_size = int(config["max_position_embeddings"]), int(config["vocab_size"])
    samples = _samples(settings, plan.source, positions, vocab_size)
    if isinstance(count, int) and samples.first(count).digest == statistics.provenance.get(
        "data_digest"
    ):
        return None
    return f"it was made from other samples, those of {statistics.provenance.get('data')}"


def _samples(settings: Settings, source: Source, positions: int, vocab_size: int) -> Samples:
    with quiet():
        return read_samples(
            settings.source,
            encoder(source.directory),
            size=settings.size,
            max_length=min(settings.max_length, positions),
            vocab_size=vocab_size,
        )


def run_calibration(
    family: Family,
    source: Source,
    settings: Settings,
    *,
    readings: Readings = NO_CHOICE,
    progress: Progress | None = None,
    tell: Tell | None = None,
    search: bool = False,
) -> Statistics:
    """Run the source's own model over the samples that the settings ask for.

    With ``search`` also AWQ's factors are found, which takes about 14 times as long.

    On a GPU it computes in the dtype of the source; on a CPU in bfloat16 if the source is in
    bfloat16, else in float32, since float16 is slow there. Layer by layer, so the model may be
    larger than memory; see :func:`phireg.calibration.collect.collect` for the memory it takes.
    """
    report = tell or (lambda line: None)
    device = pick_device(settings.device)
    dtype = _compute_dtype(source, device)
    reference = open_reference(
        family,
        source.directory,
        weights=None,
        dtype=dtype,
        device=device,
        file=readings.weights,
        adapter=readings.adapter,
        tie=readings.tie,
    )
    config = reference.model.config
    positions, vocab_size = int(config.max_position_embeddings), int(config.vocab_size)
    samples = _samples(settings, source, positions, vocab_size)
    price = None
    if device.type == "cpu":
        cost = measure(reference, samples.rows, device=device, batch_size=settings.batch_size or 1)
        if search:
            cost = dataclasses.replace(cost, token=cost.token * (1 + PASSES))
        available = len(samples.rows)
        if settings.size is None:
            counts = accumulate(map(len, samples.rows))
            in_time = sum(cost.of(tokens) <= CPU_SECONDS for tokens in counts)
            samples = samples.first(max(FEWEST, in_time))
        price = _price(cost, samples, available - len(samples.rows))
    provenance = {
        "phireg": metadata.version("phireg"),
        "family": family.name,
        "model_dir": str(source.directory),
        "revision": source.revision,
        "source": _headers(source),
        "values": source.digest(),
        "adapter": _adapter(source),
        "settings": _recorded(settings),
        "data": samples.origin,
        "data_digest": samples.digest,
        "samples": len(samples.rows),
        "tokens": samples.tokens,
        "longest": max(map(len, samples.rows)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }
    report(f"calibration: {describe(provenance)}")
    if price is not None:
        report(price)
    advice = "lower --batch-size or --calib-max-seq-length, or take --device cpu."
    with within_memory(device, advice):
        statistics = collect(
            reference,
            samples.rows,
            device=device,
            batch_size=settings.batch_size,
            progress=progress,
            search=search,
        )
    return dataclasses.replace(statistics, provenance=provenance | {**statistics.provenance})


def describe(provenance: Mapping[str, Any]) -> str:
    """The samples of statistics, and where they were computed, in one line."""
    return (
        f"{provenance['samples']} samples of up to {provenance['longest']} tokens "
        f"({provenance['tokens']} in all) from {provenance['data']}; {provenance['dtype']} on "
        f"{provenance['device']}"
    )


def misfit(
    statistics: Statistics, source: Source, settings: Settings | None, *, search: bool = False
) -> str | None:
    """The reason why statistics do not belong to a model, or to settings; None if they do."""
    provenance = statistics.provenance
    if provenance.get("source") != _headers(source):
        return f"it was made from other weights files, those of {provenance.get('model_dir')}"
    if provenance.get("values") != source.digest():
        return f"the weights have other values than those of {provenance.get('model_dir')} had"
    if provenance.get("adapter") != _adapter(source):
        return "it was made with another LoRA adapter merged, or with none"
    if search and not statistics.awq:
        return "it was made for formats without AWQ, whose factors it lacks"
    if settings is not None:
        recorded = provenance.get("settings")
        for name, value in _recorded(settings).items():
            before = recorded.get(name) if isinstance(recorded, Mapping) else None
            if before != value:
                old, new = ("left open" if x is None else x for x in (before, value))
                return f"it was made with {name} {old}, not {new}"
    return None


def _recorded(settings: Settings) -> dict[str, Any]:
    """The settings that maxima depend on."""
    digest = None
    if settings.file is not None:
        try:
            digest = file_digest(settings.file, inside=ANYWHERE)
        except SourceError as error:
            raise UsageError(error.message, hint=error.hint) from None
    return {
        "dataset": settings.dataset,
        "file": None if digest is None else f"xxh3_128:{digest}",
        "size": settings.size,
        "max_length": settings.max_length,
        "seed": settings.seed,
    }


def _headers(source: Source) -> dict[str, str]:
    return {file.name: file.header_digest for file in source.files}


def _adapter(source: Source) -> str | None:
    """Return a digest of the adapter that is merged into the weights, if one is."""
    if source.adapter is None:
        return None
    names = (source.adapter.file.name, ADAPTER_CONFIG)
    return " ".join(f"xxh3_128:{file_digest(source.directory / name)}" for name in names)


def _compute_dtype(source: Source, device: torch.device) -> torch.dtype:
    sizes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    code = sizes.most_common(1)[0][0]
    dtype = torch_dtype(code) if code in WEIGHT_DTYPES.values() else torch.float32
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def _price(cost: Cost, samples: Samples, left_out: int) -> str:
    seconds = cost.of(samples.tokens)
    shown = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    line = f"this takes about {shown} on this CPU"
    if left_out:
        line += f"; {left_out} more samples would take longer, so --calib-size must ask for them"
    return line


def encoder(directory: Path) -> Encode:
    """Encode with the source's tokenizer, which is loaded when there is more than token ids."""

    @cache
    def tokenizer() -> Tokenizer:
        loaded = find_tokenizer(directory)
        if loaded is None:
            raise UsageError(
                f"{directory} holds no tokenizer",
                hint="copy the model's tokenizer files there, or give a --calib-file whose rows "
                "have input_ids.",
            )
        return loaded

    def encode(names: Sequence[str], contents: Sequence[Content], most: int) -> list[list[int]]:
        if all(type(content) is tuple for content in contents):
            return [list(content[:most]) for content in contents if isinstance(content, tuple)]
        return [ids for _, ids in tokenizer().encode_contents(names, contents, most)]

    return encode
