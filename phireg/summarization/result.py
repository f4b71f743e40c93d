"""What a summarization found. Immutable data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phireg.summarization.scores import ROUGES, Rouge, rouge
from phireg.summarization.task import Sample, Settings


@dataclass(frozen=True, slots=True)
class Answer:
    """What a backend made of one article.

    Attributes:
        summary: the new tokens as text, special tokens left out.
        new_tokens: how many, without the stop id.
        perplexity: of prompt and summary together; None if not asked for, or if the backend
            cannot tell.
    """

    summary: str
    new_tokens: int
    perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it was run.

    Attributes:
        seconds: from the request to the last token; perplexity not included.
        memory: the backend's peak so far, in bytes; None if it cannot tell.
        answers: one for each article, in order.
    """

    seconds: float
    memory: int | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class BackendResult:
    """All that one backend did.

    Attributes:
        name: the backend's name.
        place: the directory that it ran.
        batches: in order, the warm-up not among them.
        rouge: of the summaries.
    """

    name: str
    place: str
    batches: tuple[Batch, ...]
    rouge: Rouge

    @property
    def answers(self) -> tuple[Answer, ...]:
        """One for each article."""
        return tuple(answer for batch in self.batches for answer in batch.answers)

    @property
    def perplexity(self) -> float | None:
        """The mean over articles; None if it is not known for all."""
        known = [a.perplexity for a in self.answers if a.perplexity is not None]
        return sum(known) / len(known) if len(known) == len(self.answers) else None

    @property
    def seconds(self) -> float:
        """Of all batches."""
        return sum(batch.seconds for batch in self.batches)

    @property
    def latency(self) -> float:
        """Mean seconds of a batch."""
        return self.seconds / len(self.batches)

    @property
    def new_tokens(self) -> int:
        """Of all articles."""
        return sum(answer.new_tokens for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all articles by the seconds of all batches."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def memory(self) -> int | None:
        """Peak in bytes; None if it is not known."""
        return max((b.memory for b in self.batches if b.memory is not None), default=None)

    def metric(self, name: str) -> float | None:
        """A score by name: one of ``ROUGES``, or "perplexity"."""
        return self.rouge.total[name] if name in ROUGES else self.perplexity


def backend_result(
    name: str, place: str, batches: Sequence[Batch], samples: Sequence[Sample]
) -> BackendResult:
    """Score what a backend wrote."""
    summaries = [answer.summary for batch in batches for answer in batch.answers]
    scores = rouge(summaries, [sample.reference for sample in samples])
    return BackendResult(name, place, tuple(batches), scores)


@dataclass(frozen=True, slots=True)
class Check:
    """A threshold and what was measured against it.

    Attributes:
        backend: the backend.
        metric: "rouge1", which must be above the threshold, or "perplexity", which must be below.
        value: what was measured; None if the backend cannot tell, which fails.
        threshold: the bound, which is not good enough itself.
    """

    backend: str
    metric: str
    value: float | None
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether it holds. What is not a number does not."""
        if self.value is None:
            return False
        if self.metric == "perplexity":
            return self.value < self.threshold
        return self.value > self.threshold

    def __str__(self) -> str:
        relation, must = ("<", "below") if self.metric == "perplexity" else (">", "above")
        if self.value is None:
            return f"{self.backend}: no {self.metric}; it must be {must} {self.threshold:g}"
        if self.passed:
            return f"{self.backend}: {self.metric} {self.value:.2f} {relation} {self.threshold:g}"
        return f"{self.backend}: {self.metric} {self.value:.2f} is not {must} {self.threshold:g}"


@dataclass(frozen=True, slots=True)
class Summarization:
    """A whole run.

    Attributes:
        data: what the articles are.
        note: why these, where nobody asked for them.
        settings: of the task.
        samples: the articles.
        backends: in the order asked for.
        checks: those asked for.
        resumed: how many batches an earlier run had done.
        provenance: label and value pairs about versions, models and data.
    """

    data: str
    note: str | None
    settings: Settings
    samples: tuple[Sample, ...]
    backends: tuple[BackendResult, ...]
    checks: tuple[Check, ...] = ()
    resumed: int = 0
    provenance: tuple[tuple[str, str], ...] = ()

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.passed for check in self.checks)

    def agreement(self) -> Mapping[tuple[str, str], int]:
        """For each two backends, how many summaries are the same."""
        pairs = {}
        for n, one in enumerate(self.backends):
            for other in self.backends[n + 1 :]:
                both = zip(one.answers, other.answers, strict=True)
                pairs[one.name, other.name] = sum(a.summary == b.summary for a, b in both)
        return pairs


def make_checks(
    backends: Sequence[BackendResult],
    names: Sequence[str],
    rouge1_threshold: float,
    ppl_threshold: float | None,
) -> tuple[Check, ...]:
    """Hold the named backends against the thresholds.

    Args:
        backends: the results.
        names: whom to check.
        rouge1_threshold: rouge1 must be above it.
        ppl_threshold: perplexity must be below it; None if it was not computed.
    """
    checks = []
    for result in backends:
        if result.name in names:
            checks.append(Check(result.name, "rouge1", result.metric("rouge1"), rouge1_threshold))
            if ppl_threshold is not None:
                checks.append(
                    Check(result.name, "perplexity", result.metric("perplexity"), ppl_threshold)
                )
    return tuple(checks)
