"""Calibrating a source model, and telling whether an earlier calibration serves again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import xxhash

from phireg.calibration.collect import Cost, Progress, collect, measure
from phireg.calibration.settings import Settings
from phireg.calibration.statistics import Statistics, load
from phireg.checkpoint.manifest import file_digest
from phireg.data.samples import Samples, read_samples
from phireg.device import pick_device
from phireg.dtypes import WEIGHT_DTYPES, torch_dtype
from phireg.errors import SourceError, UsageError
from phireg.family import Family
from phireg.generation.tokenizer import Tokenizer, find_tokenizer
from phireg.reference.load import open_reference
from phireg.reference.quiet import quiet
from phireg.source.model import Source

CPU_SECONDS = 300.0
"""What a calibration on a CPU may take, as far as the number of samples is not given."""

FEWEST = 8
"""Samples that are taken even so."""

_SAMPLE = 4096

Tell = Callable[[str], None]
"""Told a line of text before the work that it speaks of begins."""


def calibrate(
    family: Family,
    source: Source,
    settings: Settings,
    *,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Statistics:
    """Run the source's own model over the samples that the settings ask for.

    On a GPU it computes in the dtype of the source; on a CPU in bfloat16 if the source is in
    bfloat16, else in float32, since float16 is slow there. Layer by layer, so that a model larger
    than memory is no obstacle; see ``phireg.calibration.collect.collect`` for what it takes.

    Args:
        family: the source's.
        source: the files.
        settings: which samples, and where to compute.
        progress: told (how many more tokens went through a layer, how many will in all).
        tell: told what is calibrated on, and on a CPU what that costs.

    Returns:
        The statistics. Their provenance has ``family``, ``model_dir``, ``revision``, ``source``
        (digests of every file's header) and ``values`` (digest of a part of every tensor),
        ``settings`` as asked for, and of what was done ``data``, ``data_digest``, ``samples``,
        ``tokens``, ``longest``, ``dtype``, ``device``, ``versions`` and ``date``.

    Raises:
        UsageError: the samples or the device make no sense.
        SourceError: the model or its tokenizer cannot be read, or a maximum is not finite.
    """
    say = tell or (lambda line: None)
    device = pick_device(settings.device)
    dtype = _compute_dtype(source, device)
    reference = open_reference(family, source, weights=None, dtype=dtype, device=device)
    config = reference.model.config
    with quiet():
        samples = read_samples(
            settings,
            _Encoder(source.directory),
            vocab_size=int(config.vocab_size),
            longest=int(config.max_position_embeddings),
        )
    cost, left_out = None, 0
    if device.type == "cpu":
        cost = measure(reference, samples.rows, device=device, batch_size=settings.batch_size)
        if settings.size is None:
            whole, samples = samples, samples.first(_affordable(cost, samples))
            left_out = len(whole.rows) - len(samples.rows)
    made = {
        "phireg": metadata.version("phireg"),
        "family": family.name,
        "model_dir": str(source.directory),
        "revision": source.revision,
        "source": _headers(source),
        "values": _values(source),
        "settings": _asked(settings),
        "data": samples.origin,
        "data_digest": samples.digest,
        "samples": len(samples.rows),
        "tokens": samples.tokens,
        "longest": max(map(len, samples.rows)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    say(describe(made))
    if cost is not None:
        say(_price(cost, samples, left_out))
    found = collect(
        reference,
        samples.rows,
        device=device,
        batch_size=settings.batch_size,
        progress=progress,
    )
    return dataclasses.replace(found, provenance=made)


def describe(provenance: Mapping[str, Any]) -> str:
    """What statistics were or will be taken from, in one line."""
    return (
        f"calibration: {provenance['samples']} samples of up to {provenance['longest']} tokens "
        f"({provenance['tokens']} in all) from {provenance['data']}; {provenance['dtype']} on "
        f"{provenance['device']}"
    )


def reuse(
    path: Path, source: Source, settings: Settings | None, tell: Tell | None = None
) -> Statistics | None:
    """Statistics saved earlier, if they serve here.

    Args:
        path: the file.
        source: the model that they must be of.
        settings: what they must have been made with; None: with whatever (a file that the user
            names says for itself).
        tell: told why they do not serve.

    Returns:
        The statistics; None if there is no such file, or they do not serve.

    Raises:
        SourceError: the file is damaged.
        UsageError: the settings' own file cannot be read.
    """
    if not path.exists():
        return None
    statistics = load(path)
    reason = misfit(statistics, source, settings)
    if reason is None:
        return statistics
    if tell is not None:
        tell(f"{path} does not serve: {reason}")
    return None


def misfit(statistics: Statistics, source: Source, settings: Settings | None) -> str | None:
    """Why statistics do not belong to a model, or to settings; None if they do.

    A directory may have been moved, and what a setting of None came to does not matter.
    """
    made = statistics.provenance
    if made.get("source") != _headers(source):
        return f"it was made from other weights files, those of {made.get('model_dir')}"
    if made.get("values") != _values(source):
        return f"the weights have other values than those of {made.get('model_dir')} had"
    if settings is not None:
        before = made.get("settings")
        for name, wanted in _asked(settings).items():
            had = before.get(name) if isinstance(before, Mapping) else None
            if had != wanted:
                return f"it was made with {name} {_shown(had)}, not {_shown(wanted)}"
    return None


def _shown(value: Any) -> str:
    return "left open" if value is None else str(value)


def _asked(settings: Settings) -> dict[str, Any]:
    """The settings that decide about maxima."""
    digest = None
    if settings.file is not None:
        try:
            digest = file_digest(settings.file)
        except OSError as error:
            raise UsageError(f"cannot read {settings.file}: {error.strerror or error}") from None
    return {
        "dataset": settings.dataset,
        "file": None if digest is None else f"xxh3_128:{digest}",
        "size": settings.size,
        "max_length": settings.max_length,
        "seed": settings.seed,
    }


def _headers(source: Source) -> dict[str, str]:
    return {file.name: file.header_digest for file in source.files}


def _values(source: Source) -> str:
    """xxh3_128 of up to 4 KiB out of the middle of every tensor.

    Headers are the same for all trained versions of a model; their values are not.
    """
    hashed = xxhash.xxh3_128()
    with source.open() as reader:
        for name, tensor in sorted(source.tensors.items()):
            part = bytearray(min(_SAMPLE, tensor.nbytes))
            reader.read_into(tensor, (tensor.nbytes - len(part)) // 2, memoryview(part))
            hashed.update(name.encode())
            hashed.update(part)
    return hashed.hexdigest()


def _compute_dtype(source: Source, device: torch.device) -> torch.dtype:
    sizes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    code = sizes.most_common(1)[0][0]
    dtype = torch_dtype(code) if code in WEIGHT_DTYPES.values() else torch.float32
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def _affordable(cost: Cost, samples: Samples) -> int:
    """How many of the first samples end in time."""
    counts = accumulate(map(len, samples.rows))
    return max(FEWEST, sum(cost.of(tokens) <= CPU_SECONDS for tokens in counts))


def _price(cost: Cost, samples: Samples, left_out: int) -> str:
    seconds = cost.of(samples.tokens)
    shown = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    line = f"this takes about {shown} on this CPU"
    if left_out:
        line += f"; {left_out} more samples would take longer, so --calib-size must ask for them"
    return line


class _Encoder:
    """The source's tokenizer, loaded when there is text."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Tokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        if self._tokenizer is None:
            self._tokenizer = find_tokenizer(self._directory)
        if self._tokenizer is None:
            raise SourceError(
                f"{self._directory} holds no tokenizer to calibrate with",
                hint="copy the model's tokenizer files there, or give a --calib-file whose rows "
                "have input_ids.",
            )
        return self._tokenizer.encode(text)
