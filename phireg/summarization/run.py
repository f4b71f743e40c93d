"""Running the task: one backend after the other, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from phireg.executor import Sampling
from phireg.generation.backend import Backend, open_backend
from phireg.generation.tokenizer import Tokenizer
from phireg.summarization.contestants import Contestant, led
from phireg.summarization.result import Answer, BackendResult, Batch, backend_result
from phireg.summarization.resultsfile import Results
from phireg.summarization.scores import perplexity
from phireg.summarization.task import Sample, Settings

Progress = Callable[[str, int], None]
"""Told the name of a backend and how many more articles it has done."""


@dataclass(frozen=True, slots=True)
class Task:
    """What all backends are given.

    Attributes:
        samples: the articles, one at least.
        settings: of the task.
        tokenizer: decodes the summaries.
        stop_ids: what ends a summary.
    """

    samples: Sequence[Sample]
    settings: Settings
    tokenizer: Tokenizer
    stop_ids: Collection[int]

    def batches(self) -> list[Sequence[Sample]]:
        """The articles as they are put to a backend."""
        size = self.settings.batch_size
        return [self.samples[n : n + size] for n in range(0, len(self.samples), size)]


def evaluate(
    contestants: Sequence[Contestant], task: Task, results: Results, progress: Progress
) -> tuple[BackendResult, ...]:
    """Let every backend summarize all articles; what ``results`` has already is not run again.

    Raises:
        PhiregError: a backend cannot be opened, or refuses what is asked.
    """
    for one in contestants:
        done = results.of(one.name)
        progress(one.name, sum(len(batch.answers) for batch in done))
        waiting = task.batches()[len(done) :]
        # The processes of other ranks wait for rank 0 even where nothing is left to do.
        if not waiting and not led(one):
            continue
        with open_backend(one.name, one.place, one.options) as backend:
            for batch in _run(backend, task, waiting):
                results.add(one.name, batch)
                progress(one.name, len(batch.answers))
    return tuple(
        backend_result(one.name, str(one.place), results.of(one.name), task.samples)
        for one in contestants
    )


def _run(backend: Backend, task: Task, waiting: Sequence[Sequence[Sample]]) -> Iterator[Batch]:
    if waiting:
        _generate(backend, task, task.samples[:1])  # a warm-up, as upstream's; not scored
    for samples in waiting:
        started = time.monotonic()
        rows = _generate(backend, task, samples)
        seconds = time.monotonic() - started
        found = _perplexities(backend, samples, rows) if task.settings.eval_ppl else None
        answers = tuple(
            Answer(task.tokenizer.decode(row), len(row), found[n] if found else None)
            for n, row in enumerate(rows)
        )
        yield Batch(seconds, backend.peak_memory(), answers)


def _generate(backend: Backend, task: Task, samples: Sequence[Sample]) -> list[list[int]]:
    settings = task.settings
    prompts = [sample.prompt for sample in samples]
    return backend.generate(
        prompts, settings.output_len, task.stop_ids, Sampling(), settings.num_beams
    )


def _perplexities(
    backend: Backend, samples: Sequence[Sample], rows: Sequence[Sequence[int]]
) -> list[float] | None:
    """Of each prompt and its summary as one text, as upstream's; its first token has none."""
    texts = [[*sample.prompt, *row] for sample, row in zip(samples, rows, strict=True)]
    found = backend.mean_nll([text[:1] for text in texts], [text[1:] for text in texts])
    return None if found is None else [perplexity(nll) for nll in found]
