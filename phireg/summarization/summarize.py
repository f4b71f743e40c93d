"""Summarize articles with several backends and score the summaries."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import permutations
from pathlib import Path

from phireg.checkpoint.manifest import read_manifest
from phireg.errors import PhiregError, PhiregWarning, UsageError
from phireg.executor import Sampling
from phireg.executor.finite import rows_named
from phireg.files.json import read_json_object
from phireg.generation.backend import HF, Backend, Request, open_backend
from phireg.generation.batches import batches, warn_of_switch
from phireg.generation.limits import check_batch, check_prompts
from phireg.generation.tokenizer import Tokenizer, find_tokenizer, stop_ids
from phireg.planning.plan import plan
from phireg.source.hub import resolve_model_dir
from phireg.source.readings import Readings
from phireg.summarization.models import ModelRun, check_model_processes
from phireg.summarization.result import (
    BackendResult,
    Summarization,
    Summary,
    Thresholds,
    perplexity,
    rouge,
)
from phireg.summarization.task import Sample, Settings, load_articles, make_samples, samples_digest

Progress = Callable[[str, int, int], None]
"""Called with a backend's name, how many more articles it has done, and how many there are."""

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_PACKAGES = ("phireg", "torch", "transformers", "rouge-score")


@dataclass(frozen=True, slots=True)
class _Task:
    samples: Sequence[Sample]
    settings: Settings
    tokenizer: Tokenizer
    stop_ids: Collection[int]

    def generate(self, backend: Backend, samples: Sequence[Sample]) -> list[list[int]]:
        prompts, settings = [sample.prompt for sample in samples], self.settings
        with rows_named([sample.where for sample in samples]):
            rows = backend.generate(
                Request(prompts, settings.output_len, self.stop_ids, Sampling(), settings.num_beams)
            )
        warn_of_switch(backend.description, map(len, prompts), map(len, rows))
        return rows


def summarize(
    models: Sequence[ModelRun],
    settings: Settings | None = None,
    *,
    dataset: str = "auto",
    dataset_dir: str | None = None,
    tokenizer_dir: str | Path | None = None,
    model_dirs: Sequence[Path] = (),
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> Summarization:
    """Summarize articles with each model, and score the summaries by ROUGE.

    Everything is checked before any weights are read. Other ranks than 0 call
    :func:`phireg.summarization.models.serve_as_worker` instead.

    Args:
        models: the models and their backends.
        settings: of the task; None for the defaults of TensorRT-LLM's summarize.py.
        dataset: the articles; see :func:`phireg.summarization.task.load_articles`.
        dataset_dir: a local copy of cnn_dailymail.
        tokenizer_dir: where the tokenizer is, if not with a model.
        model_dirs: further directories of the same model that may have its tokenizer.
        thresholds: scores to check, on articles that are named or the public ones.
        progress: called after each batch.

    Raises:
        UsageError: a model cannot take the articles or the settings, or there is no tokenizer.
        PhiregError: a model or the data cannot be loaded.
    """
    settings = settings or Settings()
    check_model_processes(models)
    directories = list(dict.fromkeys([*(model.directory for model in models), *model_dirs]))
    articles = load_articles(
        dataset, settings.count_to_load, directories, dataset_dir, checked=thresholds is not None
    )
    tokenizer = _find_tokenizer(directories, tokenizer_dir)
    # Like TensorRT-LLM's script, end a summary at the end of a text, not of a turn.
    eos_id = tokenizer.eos_id
    stops = stop_ids(directories[0], tokenizer) if eos_id is None else frozenset({eos_id})
    task = _Task(make_samples(articles.rows, tokenizer, settings), settings, tokenizer, stops)
    prompts = [sample.prompt for sample in task.samples]
    for model in models:
        check_batch(model.description, settings.batch_size, settings.num_beams, Sampling())
        names = [f"{model.backend}: {sample.where}" for sample in task.samples]
        check_prompts(model.description, prompts, settings.output_len, names)
    other = _differing(models) or _other_weights(models)
    if other:
        text = f"the scores are of different models: {other}; the prompts are of one tokenizer"
        warnings.warn(text, PhiregWarning, stacklevel=2)
    report = progress or (lambda _backend, _more, _total: None)
    results = tuple(_run(model, task, report) for model in models)
    return Summarization(
        articles.name,
        articles.note,
        settings,
        tuple(task.samples),
        results,
        thresholds.check(results) if thresholds else (),
        _provenance(models, task, articles.name)
        + ((("different models", other),) if other else ()),
    )


def _find_tokenizer(directories: Sequence[Path], tokenizer_dir: str | Path | None) -> Tokenizer:
    named = None if tokenizer_dir is None else Path(tokenizer_dir)
    tokenizer = find_tokenizer(directories[0], named)
    for directory in directories[1:]:
        tokenizer = tokenizer or find_tokenizer(directory)
    if tokenizer is None:
        raise UsageError(
            f"{directories[0]} carries no tokenizer",
            hint="give --tokenizer-dir (or --model-dir) the directory of the source model.",
        )
    return tokenizer


def _differing(models: Sequence[ModelRun]) -> str:
    """Name the sizes in which models differ, by their config.json."""
    configs = []
    for model in models if len(models) > 1 else ():
        config = read_json_object(resolve_model_dir(str(model.directory), None)[0] / "config.json")
        configs.append(config.get("pretrained_config", config))  # that of an engine's checkpoint
    values = {key: [config.get(key) for config in configs] for key in _SIZES}
    return ", ".join(
        f"{key} is {' and '.join(map(str, found))}"
        for key, found in values.items()
        if len({size for size in found if isinstance(size, int)}) > 1
    )


def _other_weights(models: Sequence[ModelRun]) -> str:
    """Name a source model of which a checkpoint was not made, by the digest in its manifest."""
    for source, model in permutations(models, 2):
        manifest = (read_manifest(model.directory) or {}) if source.backend == HF else {}
        recorded = manifest.get("source", {}).get("values")
        readings = asdict(Readings.recorded(manifest))
        with suppress(PhiregError):  # what cannot be planned is only run
            if recorded and plan(source.directory, **readings).source.digest() != recorded:
                return f"{model.directory} was not made from the weights in {source.directory}"
    return ""


def _run(model: ModelRun, task: _Task, progress: Progress) -> BackendResult:
    summaries: list[Summary] = []
    batch_seconds = []
    with open_backend(model.backend, model.directory, model.options) as backend:
        task.generate(backend, task.samples[:1])  # the warm-up of TensorRT-LLM's script
        lengths = [len(sample.prompt) for sample in task.samples]
        settings = task.settings
        for part in batches(backend.description, lengths, settings.batch_size, settings.output_len):
            samples = task.samples[part]
            started = time.monotonic()
            rows = task.generate(backend, samples)
            batch_seconds.append(time.monotonic() - started)
            scores = _perplexities(backend, samples, rows) if settings.eval_ppl else None
            for index, row in enumerate(rows):
                text = task.tokenizer.decode(row)
                summaries.append(Summary(text, len(row), scores[index] if scores else None))
            progress(model.backend, len(samples), len(task.samples))
        memory = backend.peak_memory()
    rouge_scores = rouge(
        [summary.text for summary in summaries], [sample.reference for sample in task.samples]
    )
    return BackendResult(
        model.backend,
        str(model.directory),
        tuple(summaries),
        rouge_scores,
        tuple(batch_seconds),
        memory,
    )


def _perplexities(
    backend: Backend, samples: Sequence[Sample], rows: Sequence[Sequence[int]]
) -> list[float] | None:
    """Score each prompt and its summary as one text, as TensorRT-LLM's script does."""
    texts = [[*sample.prompt, *row] for sample, row in zip(samples, rows, strict=True)]
    with rows_named([sample.where for sample in samples]):
        means = backend.mean_nll([text[:1] for text in texts], [text[1:] for text in texts])
    return None if means is None else [perplexity(mean) for mean in means]


def _provenance(models: Sequence[ModelRun], task: _Task, data: str) -> tuple[tuple[str, str], ...]:
    settings = ", ".join(f"{key} {value}" for key, value in asdict(task.settings).items())
    return (
        ("data", f"{data}: {len(task.samples)} articles"),
        ("digest of texts and prompts", f"sha256 {samples_digest(task.samples)}"),
        ("settings", settings),
        *(
            (
                model.backend,
                f"{model.directory} ({model.options.dtype or 'own dtype'}, "
                f"device {model.options.device})",
            )
            for model in models
        ),
        ("versions", ", ".join(f"{name} {version(name)}" for name in _PACKAGES)),
    )
