"""The result of a summarization."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from phireg.summarization.scores import ROUGES, Rouge
from phireg.summarization.task import Sample, Settings


@dataclass(frozen=True, slots=True)
class Summary:
    """A backend's summary of one article.

    Attributes:
        text: of the new tokens, without special tokens.
        new_tokens: how many, without the stop id.
        perplexity: of prompt and summary together; None if not computed.
    """

    text: str
    new_tokens: int
    perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class BackendResult:
    """The result of one backend.

    Attributes:
        name: the backend's name.
        directory: of the model that it ran.
        summaries: of each article.
        rouge: of the summaries.
        batch_seconds: of the generation of each batch, without the warm-up.
        memory: the peak in bytes; None if unknown.
    """

    name: str
    directory: str
    summaries: tuple[Summary, ...]
    rouge: Rouge
    batch_seconds: tuple[float, ...]
    memory: int | None

    @property
    def perplexity(self) -> float | None:
        """The mean over articles; None unless it is known for all."""
        known = [s.perplexity for s in self.summaries if s.perplexity is not None]
        return sum(known) / len(known) if len(known) == len(self.summaries) else None

    @property
    def seconds(self) -> float:
        """The seconds of all batches."""
        return sum(self.batch_seconds)

    @property
    def latency(self) -> float:
        """The mean seconds of a batch."""
        return self.seconds / len(self.batch_seconds)

    @property
    def new_tokens(self) -> int:
        """The new tokens of all articles."""
        return sum(summary.new_tokens for summary in self.summaries)

    @property
    def tokens_per_second(self) -> float:
        """The new tokens of all articles by the seconds of all batches."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def metric(self, name: str) -> float | None:
        """Return a score by name: one of ``ROUGES``, or "perplexity"."""
        return self.rouge.total[name] if name in ROUGES else self.perplexity


@dataclass(frozen=True, slots=True)
class Check:
    """A score and its threshold.

    Attributes:
        backend: the backend.
        metric: "rouge1", which must be above the threshold, or "perplexity", which must be below.
        value: the score; None if the backend does not give it, which fails.
        threshold: a score equal to it fails.
    """

    backend: str
    metric: str
    value: float | None
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether the score is good enough; NaN is not."""
        if self.value is None:
            return False
        if self.metric == "perplexity":
            return self.value < self.threshold
        return self.value > self.threshold

    def __str__(self) -> str:
        bound = f"{'below' if self.metric == 'perplexity' else 'above'} {self.threshold:g}"
        if self.value is None:
            return f"{self.backend}: no {self.metric}; it must be {bound}"
        verb = "is" if self.passed else "is not"
        return f"{self.backend}: {self.metric} {self.value:.2f} {verb} {bound}"


@dataclass(frozen=True, slots=True)
class Summarization:
    """A whole run.

    Attributes:
        data: the origin of the articles.
        note: why these, if the user did not choose them.
        settings: of the task.
        samples: the articles.
        backends: in the order asked for.
        checks: of the scores that have thresholds.
        provenance: label and value pairs about versions, models and data.
    """

    data: str
    note: str | None
    settings: Settings
    samples: tuple[Sample, ...]
    backends: tuple[BackendResult, ...]
    checks: tuple[Check, ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)

    def agreement(self) -> Mapping[tuple[str, str], int]:
        """For each two backends, return how many summaries are the same."""
        return {
            (first.name, second.name): sum(
                a.text == b.text for a, b in zip(first.summaries, second.summaries, strict=True)
            )
            for first, second in combinations(self.backends, 2)
        }


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The scores to reach.

    Attributes:
        backends: names of the backends to check.
        rouge1: must be exceeded.
        perplexity: must be undercut; None if it is not computed.
    """

    backends: Collection[str]
    rouge1: float
    perplexity: float | None = None

    def check(self, results: Sequence[BackendResult]) -> tuple[Check, ...]:
        """Compare the backends' scores with the thresholds."""
        limits = {"rouge1": self.rouge1, "perplexity": self.perplexity}
        return tuple(
            Check(result.name, metric, result.metric(metric), limit)
            for result in results
            if result.name in self.backends
            for metric, limit in limits.items()
            if limit is not None
        )
