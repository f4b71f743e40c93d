"""Measure a quantized checkpoint that was just written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phireg import demo
from phireg.calibration.calibrate import describe, encoder
from phireg.calibration.settings import Settings
from phireg.config.hf import HFConfig
from phireg.conversion.stream import assemble
from phireg.data.rows import AUTO
from phireg.data.samples import DEFAULT_SIZE, Encode, read_samples
from phireg.device import pick_device
from phireg.dtypes import as_torch
from phireg.errors import PhiregError, SourceError
from phireg.executor import Executor, load, read_meaning
from phireg.executor.generate import generate as write
from phireg.executor.sources import Source
from phireg.files.json import read_json_object
from phireg.generation.tokenizer import find_tokenizer, stop_ids
from phireg.planning.build import build_plan
from phireg.planning.model import DEFAULT_TARGET, Plan
from phireg.quality.layerwise import compare_layers
from phireg.quality.result import Continuation, Quality, TextQuality
from phireg.reader.spec import parse_spec
from phireg.reference.quiet import quiet
from phireg.source.model import Reader

TOKENS = 2048
"""Most tokens of a measurement."""

CPU_BUDGET = 4e12
"""Multiply-adds that a measurement may take on a CPU: about two minutes on a few cores."""

FEWEST = 64
"""Tokens below which nothing is measured unless the user asks for it."""

_FURTHER = 64
"""Samples that are read behind those that were calibrated on."""

_ARTICLES = 32
"""Articles of a demo model to read: more than ``TOKENS`` tokens."""

_PROMPT, _NEW_TOKENS = 64, 48
"""Tokens that both models continue, and of the continuation, at most."""

_MOST_WEIGHTS = 5e7
"""Weights of a model that writes on a CPU, which reads all of them for every token."""


def affordable(plan: Plan, device: torch.device) -> int:
    """Return how many tokens both models can run in time."""
    if device.type == "cuda":
        return TOKENS
    # Each model multiplies every weight once.
    return min(TOKENS, int(CPU_BUDGET / (2 * _weights(plan))))


def _weights(plan: Plan) -> int:
    shapes = [tensor.shape for tensor in plan.source.tensors.values()]
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) > 1)


def measure(
    plan: Plan,
    checkpoint_dir: str | Path,
    settings: Settings,
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Compare a quantized checkpoint with the one that ``convert`` would have written.

    Both run in float32 on the executor, which reads one layer of each at a time: the checkpoint's
    from its files, the unquantized one's from the source. The samples are those of ``settings``
    behind the ones that ``provenance``, of the statistics, tells of; of a demo model, unless the
    settings name others, the articles that were held back from its training.

    Both also continue the beginning of the text, where that takes seconds. ``progress`` takes the
    number of further layers, and of all.
    """
    device = pick_device(settings.device)
    directory = Path(checkpoint_dir)
    spec = read_meaning(directory)
    encode = encoder(plan.source.directory)
    with quiet():
        text = held_back(settings, plan.source.directory, encode) or choose_text(
            settings,
            provenance,
            encode,
            vocab_size=spec.vocab_size,
            longest=spec.max_position_embeddings,
        )
    text = text.cut(max(affordable(plan, device), FEWEST), spec.max_position_embeddings)
    if not text.rows:
        raise SourceError(
            f"{text.origin}: no sample has two tokens or more, so nothing can be measured"
        )
    hf = HFConfig(read_json_object(plan.source.directory / "config.json"))
    options = dataclasses.replace(
        plan.options,
        qformat=None,
        kv_cache_dtype=None,
        exclude=(),
        quantize_lm_head=False,
        target=DEFAULT_TARGET,
    )
    unquantized = build_plan(plan.chosen, hf, plan.source, options, plan.model_dir)
    report = progress or (lambda more, total: None)
    with plan.source.open() as reader:
        ranks = range(spec.tp_size)
        planned = [_planned_tensors(unquantized, rank, reader) for rank in ranks]

        def opened(**how: Any) -> Iterator[Executor]:
            before = parse_spec(dict(unquantized.config))
            yield Executor(before, planned, ranks, device=device, **how)
            yield load(directory, device, **how)

        plain, quantized = opened(dtype=torch.float32, offload=True)
        layers = spec.num_layers
        linears, hidden, logits = compare_layers(
            plain, quantized, text.rows, lambda more: report(more, layers)
        )
        continuation: Continuation | str
        if device.type == "cpu" and _weights(plan) > _MOST_WEIGHTS:
            continuation = "it would take long on a CPU, where phireg run does it"
        else:
            dtype = spec.dtype if device.type == "cuda" else torch.float32
            try:
                continuation = _continue(opened(dtype=dtype), text, plan.source.directory)
            except PhiregError as error:  # a tokenizer, or a range of 16 bits: the numbers stand
                continuation = error.message
    assert plan.options.qformat is not None
    text_quality = TextQuality(
        text.origin,
        len(text.rows),
        sum(map(len, text.rows)),
        text.calibrated,
        spec.vocab_size,
        **logits,
    )
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
        sum(unquantized.file_sizes),
        sum(plan.file_sizes),
        continuation,
        tuple(labels.items()),
    )


@dataclass(frozen=True, slots=True)
class Text:
    """The text to measure on; ``calibrated`` if the statistics were taken from the same samples."""

    rows: tuple[tuple[int, ...], ...]
    origin: str
    calibrated: bool
    prompt: tuple[int, ...]  # what both models are to continue

    def cut(self, tokens: int, longest: int) -> Text:
        """Keep so many tokens at most, in rows of at most ``longest``."""
        rows: list[tuple[int, ...]] = []
        for row in self.rows:
            kept = row[: min(longest, tokens - sum(map(len, rows)))]
            if len(kept) < 2:
                break
            rows.append(kept)
        return dataclasses.replace(self, rows=tuple(rows))


def held_back(settings: Settings, directory: Path, encode: Encode) -> Text | None:
    """Return a demo model's own articles with their summaries; None if others are named."""
    family = demo.family_of([directory]) if settings.source == AUTO else None
    if family is None:
        return None
    articles = demo.find(family).articles[:_ARTICLES]
    texts = [articles[0].prompt, *(article.prompt + article.reference for article in articles)]
    names = [f"article {number}" for number in range(len(texts))]
    prompt, *rows = map(tuple, encode(names, texts, settings.max_length * _ARTICLES))
    return Text(tuple(rows), "the articles held back from the demo model's training", False, prompt)


def _continue(models: Iterator[Executor], text: Text, directory: Path) -> Continuation | str:
    tokenizer = find_tokenizer(directory)
    if tokenizer is None:
        return "the model has no tokenizer"
    stops = stop_ids(directory, tokenizer)
    written = []
    for model in models:
        if model.offload:
            return "the model does not fit into the memory at once; phireg run takes longer"
        most = min(_NEW_TOKENS, model.spec.max_position_embeddings - len(text.prompt))
        if most < 1:
            return "the text is as long as the model's context"
        (row,) = write(model, [text.prompt], most, stops)
        written.append(tokenizer.decode([token for token in row if token not in stops]))
        del model  # of two models in memory, the first leaves it before the second comes
    before, after = written
    return Continuation(tokenizer.decode(text.prompt), before, after, _NEW_TOKENS)


def choose_text(
    settings: Settings,
    provenance: Mapping[str, Any] | None,
    encode: Encode,
    *,
    vocab_size: int,
    longest: int,
) -> Text:
    """Choose the samples behind those of the calibration, or the first ones if there are none."""
    used = 0 if provenance is None else int(provenance["samples"])
    samples = read_samples(
        settings.source,
        encode,
        size=None,
        max_length=min(settings.max_length, longest),
        vocab_size=vocab_size,
        most=max(used + _FURTHER, DEFAULT_SIZE),
    )
    if provenance is not None and samples.first(used).digest != provenance["data_digest"]:
        used = 0  # statistics of other text
    further = [row for row in samples.rows[used:] if len(row) > 1]
    rows = tuple(further) or samples.rows
    return Text(rows, samples.origin, used > 0 and not further, rows[0][:_PROMPT])


def _planned_tensors(plan: Plan, rank: int, reader: Reader) -> Source:
    """Return a function from a tensor's name to the tensor that the plan would write."""
    outputs = {output.name: output for output in plan.outputs if output.rank == rank}

    def read(name: str) -> Tensor:
        output = outputs[name]
        tensor: Tensor = as_torch(assemble(plan, output, reader), output.dtype)
        return tensor.reshape(output.shape)

    return read
