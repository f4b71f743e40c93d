"""The task: which articles, and what a model is given of each. As TensorRT-LLM's summarize.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phireg.data.rows import Row
from phireg.errors import UsageError
from phireg.generation.tokenizer import Tokenizer

PROMPT_END = " TL;DR: "


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the summaries, given data and model. The defaults are upstream's.

    Attributes:
        batch_size: prompts continued side by side.
        max_ite: batches at most.
        max_input_length: tokens of a prompt at most; its beginning is cut off.
        min_input_length: articles whose prompt has no more tokens than this are left out.
        output_len: new tokens at most.
        num_beams: 1 is greedy.
        eval_ppl: whether perplexity is computed.
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
        """How many articles are wanted."""
        return self.batch_size * self.max_ite


@dataclass(frozen=True, slots=True)
class Sample:
    """An article to summarize.

    Attributes:
        where: where it came from.
        article: the whole text.
        reference: the summary that a person wrote.
        prompt: the token ids that the model continues.
    """

    where: str
    article: str
    reference: str
    prompt: tuple[int, ...]


def prompt_text(article: str) -> str:
    """What the model continues, before it is cut to length.

    cnn_dailymail holds split words ("did n't"), which upstream joins; the blank behind the colon
    goes with the strip.
    """
    return (article + PROMPT_END).strip().replace(" n't", "n't")


def make_samples(rows: Iterable[Row], tokenizer: Tokenizer, settings: Settings) -> list[Sample]:
    """The first articles in order, with their prompts.

    Args:
        rows: with the texts ``article`` and ``highlights``.
        tokenizer: the model's; special tokens are on.
        settings: how many, and how long.

    Raises:
        UsageError: a row lacks one of its texts, or no article is long enough.
    """
    found: list[Sample] = []
    for row in rows:
        if len(found) == settings.count:
            break
        article, reference = (_unicode(row, name) for name in ("article", "highlights"))
        prompt = tokenizer.encode(prompt_text(article), max_length=settings.max_input_length)
        if len(prompt) > settings.min_input_length:
            found.append(Sample(row.where, article, reference, tuple(prompt)))
    if not found:
        raise UsageError(
            f"no article's prompt has more than {settings.min_input_length} tokens",
            hint="lower --min-input-length.",
        )
    return found


def _unicode(row: Row, name: str) -> str:
    text = row.text(name)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{row.where}: '{name}' is not valid Unicode text") from None
    return text


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of all texts and prompts, in hexadecimal."""
    content = [[one.article, one.reference, one.prompt] for one in samples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
