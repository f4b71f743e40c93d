"""The task of TensorRT-LLM's summarize.py: the articles, and the prompt made of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from phireg import demo
from phireg.data.rows import AUTO, CNN_DAILYMAIL, Data, Row, load_rows
from phireg.errors import UsageError
from phireg.generation.tokenizer import Tokenizer

DEMO = "demo"
"""The name of the demo models' held-back articles."""

PROMPT_END = " TL;DR: "

_TEST_ROWS = 11_490
"""Rows of cnn_dailymail's test split."""

_DEFAULT_FAMILY = "phi3-small"
_TOKENIZERS = ("tokenizer.json", "cl100k_base.tiktoken")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the task; names and defaults are those of TensorRT-LLM's summarize.py.

    Attributes:
        batch_size: prompts continued side by side.
        max_ite: batches at most.
        max_input_length: tokens of a prompt at most; its beginning is cut off.
        min_input_length: articles whose prompt has no more tokens than this are left out.
        output_len: new tokens at most.
        num_beams: 1 is greedy.
        eval_ppl: compute perplexity.
    """

    batch_size: int = 1
    max_ite: int = 20
    max_input_length: int = 923
    min_input_length: int = 0
    output_len: int = 100
    num_beams: int = 1
    eval_ppl: bool = False

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
    """An article to summarize.

    Attributes:
        where: file and line, for messages.
        article: the whole text.
        reference: the human summary.
        prompt: the token ids that the model continues.
    """

    where: str
    article: str
    reference: str
    prompt: tuple[int, ...]


def load_articles(
    dataset: str, count: int, directories: Sequence[Path], dataset_dir: str | None = None
) -> Data:
    """Load articles with ``article`` and ``highlights``.

    Args:
        dataset: a file of rows; "cnn_dailymail" (its test split); "demo" (the held-back articles
            of a demo model); or "auto": a demo model's own articles, for other models
            cnn_dailymail or, if it is not available, held-back articles with a note.
        count: how many are needed, before any is left out.
        directories: of the models.
        dataset_dir: a local copy of cnn_dailymail.

    Raises:
        UsageError: there is no such data, or ``dataset_dir`` has no effect on the choice.
        SourceError: cnn_dailymail cannot be loaded.
    """
    family = _demo_family(directories)
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
    return load_rows(dataset, "test", count, {DEMO: lambda: _held_back(family or _DEFAULT_FAMILY)})


def _demo_family(directories: Sequence[Path]) -> str | None:
    """Find the family whose demo model a directory was made from, by its tokenizer."""
    for family in demo.families()[0]:
        original = demo.find(family).directory
        for name in _TOKENIZERS:
            if any(_same_file(original / name, directory / name) for directory in directories):
                return family
    return None


def _same_file(first: Path, second: Path) -> bool:
    return (
        first.is_file()
        and second.is_file()
        and first.stat().st_size == second.stat().st_size
        and first.read_bytes() == second.read_bytes()
    )


def _held_back(family: str) -> Data:
    articles = demo.find(family).articles
    rows = [
        Row(f"article {number}", {"article": article.text, "highlights": article.reference})
        for number, article in enumerate(articles)
    ]
    return Data("the held-back split of phireg's demo models", rows)


def prompt_text(article: str) -> str:
    """Return the text of a prompt, before it is cut to length.

    As TensorRT-LLM's script, join the words that cnn_dailymail splits ("did n't"), and strip the
    blank after the colon.
    """
    return (article + PROMPT_END).strip().replace(" n't", "n't")


def make_samples(rows: Iterable[Row], tokenizer: Tokenizer, settings: Settings) -> list[Sample]:
    """Return the first articles in order, with their prompts.

    Args:
        rows: with the texts ``article`` and ``highlights``.
        tokenizer: the model's; special tokens are on.
        settings: how many, and how long.

    Raises:
        UsageError: a row lacks one of its texts, or no article is long enough.
    """
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
