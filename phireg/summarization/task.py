"""The task of TensorRT-LLM's summarize.py: the articles, and the prompt made of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from phireg import demo
from phireg.data.row import Row
from phireg.data.rows import AUTO, CNN_DAILYMAIL, Data, load_rows
from phireg.errors import PhiregError, UsageError
from phireg.generation.tokenizer import Tokenizer

DEMO = "demo"
_TEST_ROWS = 11_490  # of cnn_dailymail's test split
_DEFAULT_FAMILY = "phi3-small"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the task; names and defaults are those of TensorRT-LLM's summarize.py."""

    batch_size: int = 1
    max_ite: int = 20  # batches at most
    max_input_length: int = 923  # tokens of a prompt at most; its beginning is cut off
    min_input_length: int = 0  # articles whose prompt has no more tokens are left out
    output_len: int = 100  # new tokens at most
    num_beams: int = 1  # 1 is greedy
    eval_ppl: bool = False  # compute perplexity

    @property
    def count(self) -> int:
        """The number of articles."""
        return self.batch_size * self.max_ite

    @property
    def count_to_load(self) -> int:
        """The number of articles to load, as some may be left out."""
        return _TEST_ROWS if self.min_input_length else self.count


@dataclass(frozen=True, slots=True)
class Sample:
    """An article to summarize."""

    where: str  # file and line, for messages
    article: str
    reference: str  # the human summary
    prompt: tuple[int, ...]  # the token ids that the model continues


def load_articles(
    dataset: str,
    count: int,
    directories: Sequence[Path],
    dataset_dir: str | None = None,
    *,
    checked: bool = False,
) -> Data:
    """Load articles with ``article`` and ``highlights`` for the models of ``directories``.

    The dataset is a file of rows; "cnn_dailymail" (its test split, of ``dataset_dir`` if given);
    "demo" (the held-back articles of a demo model); or "auto": a demo model's own articles, for
    other models cnn_dailymail or, if it is not available, held-back articles with a note. Scores
    that are to be checked come from no such substitute: without cnn_dailymail that is an error.
    """
    family = demo.family_of(directories)
    if dataset_dir is not None:
        if dataset not in (AUTO, CNN_DAILYMAIL):
            raise UsageError(
                f"--dataset-dir is a copy of cnn_dailymail, and --dataset asks for {dataset}",
                hint="give one of them.",
            )
        if not Path(dataset_dir).is_dir():
            raise UsageError(
                f"--dataset-dir {dataset_dir}: no such directory",
                hint="give a copy of the hub's ccdv/cnn_dailymail.",
            )
        dataset = dataset_dir
    elif dataset == AUTO and family:
        dataset = DEMO
    elif dataset == AUTO and checked:
        return _required_articles(count)
    return load_rows(dataset, "test", count, {DEMO: lambda: _held_back(family or _DEFAULT_FAMILY)})


def _required_articles(count: int) -> Data:
    try:
        return load_rows(CNN_DAILYMAIL, "test", count, {})
    except PhiregError as error:
        advice = f"{error.hint.rstrip('.')}; or " if error.hint else ""
        raise type(error)(
            f"a threshold is for the articles of cnn_dailymail: {error.message}",
            hint=f"{advice}name the articles: --dataset FILE for your own, "
            "--dataset-dir DIR for a copy of the set, --dataset demo for the demo models' own.",
        ) from None


def _held_back(family: str) -> Data:
    rows = [
        Row(f"article {number}", {"article": article.text, "highlights": article.reference})
        for number, article in enumerate(demo.find(family).articles)
    ]
    return Data("the held-back split of phireg's demo models", rows)


def prompt_text(article: str) -> str:
    """Return a prompt's text before it is cut, cleaned as TensorRT-LLM's script does it."""
    return (article + demo.PROMPT_END).strip().replace(" n't", "n't")


def make_samples(rows: Iterable[Row], tokenizer: Tokenizer, settings: Settings) -> list[Sample]:
    """Return the first articles that are long enough, in order, with their prompts."""
    samples: list[Sample] = []
    for row in rows:
        if len(samples) == settings.count:
            break
        article, reference = row.text("article"), row.text("highlights")
        prompt = tokenizer.encode(prompt_text(article), max_length=settings.max_input_length)
        if len(prompt) > settings.min_input_length:
            samples.append(Sample(row.where, article, reference, tuple(prompt)))
    if not samples:
        raise UsageError(
            f"no article's prompt has more than {settings.min_input_length} tokens",
            hint="lower --min-input-length.",
        )
    return samples


def samples_digest(samples: Sequence[Sample]) -> str:
    """Return the SHA-256 of all texts and prompts, in hexadecimal."""
    content = [[sample.article, sample.reference, sample.prompt] for sample in samples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
