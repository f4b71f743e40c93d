"""Measuring a quantized checkpoint that was just written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from phireg.calibration.calibrate import describe
from phireg.calibration.settings import Settings
from phireg.device import pick_device
from phireg.errors import SourceError
from phireg.executor import Executor, ModelSpec, read_spec
from phireg.executor.model import open_ranks
from phireg.generation.tokenizer import find_tokenizer
from phireg.planning.model import Plan
from phireg.quality.layerwise import walk
from phireg.quality.result import Quality, TextQuality
from phireg.quality.text import Text, choose_text
from phireg.quality.unquantized import rank_sources, unquantized_plan
from phireg.reader.spec import parse_spec
from phireg.reference.quiet import quiet

TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of a report at most, by kind of device."""

CPU_BUDGET = 4e12
"""Multiply-adds that a report may take on a CPU: about two minutes on a few cores."""

FEWEST = 64
"""Tokens below which nothing is measured unless somebody asks for it."""

Progress = Callable[[int, int], None]


def affordable(plan: Plan, device: torch.device) -> int:
    """How many tokens both models can run in time; every weight is multiplied once with each."""
    most = TOKENS[device.type]
    if device.type == "cuda":
        return most
    weights = sum(
        tensor.shape[0] * tensor.shape[1]
        for tensor in plan.source.tensors.values()
        if len(tensor.shape) > 1
    )
    return min(most, int(CPU_BUDGET / (2 * weights)))


def measure(
    plan: Plan,
    checkpoint_dir: str | Path,
    settings: Settings,
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Hold a quantized checkpoint against what ``convert`` would have written.

    Both run in float32 on the executor, which reads one layer of each at a time: the checkpoint's
    from its files, the unquantized one's from the source.

    Args:
        plan: what the checkpoint was made by.
        checkpoint_dir: the checkpoint.
        settings: the data whose samples behind those of the calibration are run, and where.
        provenance: of the statistics that it was made with, or None.
        progress: told (how many more layers are done, how many there are).

    Raises:
        UsageError: no such device, or the samples make no sense.
        SourceError: the source cannot be read, or has no tokenizer and the samples are text.
        CheckError: the executor refuses the checkpoint.
    """
    device = pick_device(settings.device)
    place = Path(checkpoint_dir)
    spec = read_spec(place)
    text = _text(plan, settings, provenance, spec, device)
    unquantized = unquantized_plan(plan)
    told = progress or (lambda more, total: None)
    with plan.source.open() as reader:
        ranks = range(spec.tp_size)
        options: dict[str, Any] = {"device": device, "dtype": torch.float32, "offload": True}
        plain = Executor(
            parse_spec(dict(unquantized.config)),
            rank_sources(unquantized, reader),
            ranks,
            **options,
        )
        quantized = Executor(spec, open_ranks(place, spec, ranks), ranks, **options)
        layers = spec.num_layers
        found = walk(plain, quantized, text.rows, lambda more: told(more, layers))
    made = plan.options
    assert made.qformat is not None
    text_quality = TextQuality(
        text.origin,
        len(text.rows),
        sum(map(len, text.rows)),
        text.calibrated,
        found.top1,
        found.kl,
        found.nll,
        found.unquantized_nll,
    )
    return Quality(
        str(checkpoint_dir),
        plan.family,
        made.qformat,
        made.kv_cache_dtype,
        spec.architecture.name,
        made.dtype,
        made.tp_size,
        found.linears,
        found.hidden,
        text_quality,
        tuple(_provenance(plan, place, provenance, text_quality, device)),
    )


def _text(
    plan: Plan,
    settings: Settings,
    provenance: Mapping[str, Any] | None,
    spec: ModelSpec,
    device: torch.device,
) -> Text:
    directory = plan.source.directory
    tokenizer = find_tokenizer(directory)

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            raise SourceError(
                f"{directory} holds no tokenizer to measure with",
                hint="copy the model's tokenizer files there, or give a --calib-file whose rows "
                "have input_ids.",
            )
        return tokenizer.encode(text)

    with quiet():
        text = choose_text(
            settings,
            provenance,
            encode,
            tokens=max(affordable(plan, device), FEWEST),
            vocab_size=spec.vocab_size,
            longest=spec.max_position_embeddings,
        )
    if not text.rows:
        raise SourceError(
            f"{text.origin}: no sample has two tokens or more, so nothing can be measured"
        )
    return text


def _provenance(
    plan: Plan,
    place: Path,
    provenance: Mapping[str, Any] | None,
    text: TextQuality,
    device: torch.device,
) -> list[tuple[str, str]]:
    rows = [
        ("checkpoint", str(place.absolute())),
        ("source", f"{plan.model_dir}, {len(plan.source.files)} file(s)"),
    ]
    if provenance is not None:
        rows.append(("calibration", describe(provenance)))
        rows.append(("calibrated", str(provenance.get("date", "unknown"))))
    return [
        *rows,
        ("text", text.description),
        ("computed", f"in float32 on {device}, torch {torch.__version__}"),
    ]
