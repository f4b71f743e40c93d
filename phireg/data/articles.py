"""Where the articles come from: a local file, cnn_dailymail, or a demo model's held-back split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phireg import demo
from phireg.data.rows import CNN_DAILYMAIL, CNN_DAILYMAIL_CONFIG, Row, cnn_dailymail, read_rows
from phireg.errors import PhiregError, UsageError

AUTO, CNN, DEMO = "auto", "cnn_dailymail", "demo"
TEST_ROWS = 11_490
"""Rows of cnn_dailymail's test split."""

_FALLBACK_FAMILY = "phi3-small"
_TOKENIZERS = ("tokenizer.json", "cl100k_base.tiktoken")


@dataclass(frozen=True, slots=True)
class Data:
    """Articles with references.

    Attributes:
        name: what they are, in words for the output.
        rows: with ``article`` and ``highlights``.
        note: why it is these and not others, where nobody asked for them.
    """

    name: str
    rows: Sequence[Row]
    note: str | None = None


def open_data(choice: str, count: int, places: Sequence[Path], dataset_dir: str | None) -> Data:
    """The articles that a user means.

    Args:
        choice: a file (see :func:`phireg.data.rows.read_rows`), "cnn_dailymail" (its test split),
            "demo" (the held-back split), or "auto": a demo model's own split; for any other
            model cnn_dailymail; where that cannot be had, the held-back split, with a note.
        count: how many are needed; there may be fewer.
        places: the directories of the models.
        dataset_dir: a local copy of cnn_dailymail.

    Raises:
        UsageError: there is no such file or directory, or ``dataset_dir`` has no effect on the
            choice.
        PhiregError: they cannot be had.
    """
    if dataset_dir is not None and choice not in (AUTO, CNN):
        raise UsageError(
            f"--dataset-dir is a copy of cnn_dailymail, and --dataset asks for {choice}",
            hint="give one of them.",
        )
    if dataset_dir is not None and not Path(dataset_dir).is_dir():
        raise UsageError(
            f"--dataset-dir {dataset_dir}: no such directory",
            hint=f"give a copy of {CNN_DAILYMAIL}, or the directory that holds {CNN_DAILYMAIL}.",
        )
    if choice not in (AUTO, CNN, DEMO) and not Path(choice).is_file():
        raise UsageError(
            f"--dataset {choice}: no such file",
            hint=f"give a file of articles, {CNN} or {DEMO}.",
        )
    owner = demo_family(places) if choice in (AUTO, DEMO) and dataset_dir is None else None
    if choice == DEMO or (choice == AUTO and owner):
        return _held_back(owner or _FALLBACK_FAMILY)
    if choice not in (AUTO, CNN):
        return Data(choice, read_rows(Path(choice)))
    try:
        rows = cnn_dailymail("test", count, dataset_dir=_inside(dataset_dir))
    except PhiregError as error:
        if choice == CNN or dataset_dir is not None:
            raise
        return _held_back(_FALLBACK_FAMILY, f"{error.message}; these articles come with phireg")
    return Data(f"{CNN_DAILYMAIL} {CNN_DAILYMAIL_CONFIG}, test split", rows)


def demo_family(places: Sequence[Path]) -> str | None:
    """The family whose demo model one of these is made from, as its tokenizer shows."""
    for family in demo.families()[0]:
        directory = demo.find(family).directory
        for name in _TOKENIZERS:
            own = directory / name
            if own.is_file() and any(_same(own, place / name) for place in places):
                return family
    return None


def _same(one: Path, other: Path) -> bool:
    return (
        other.is_file()
        and one.stat().st_size == other.stat().st_size
        and one.read_bytes() == other.read_bytes()
    )


def _held_back(family: str, note: str | None = None) -> Data:
    rows = [
        Row(f"article {number}", {"article": one.text, "highlights": one.reference})
        for number, one in enumerate(demo.find(family).articles)
    ]
    return Data("the held-back split of phireg's demo models", rows, note)


def _inside(dataset_dir: str | None) -> str | None:
    """Upstream looks for the set's own name inside the directory, unless it ends with it."""
    if dataset_dir is None:
        return None
    below = Path(dataset_dir) / CNN_DAILYMAIL
    return str(below) if below.is_dir() else dataset_dir
