"""The small trained models that families bring along: converted, verified, and put to work.

>>> from phireg import demo
>>> model = demo.find("phi3-small")
>>> demo.convert(model, Path("ckpt"))  # doctest: +SKIP
>>> demo.summarize(Path("ckpt"), model.articles[:2])  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import phireg
from phireg import registry
from phireg.conversion.convert import Converted
from phireg.errors import OutputError, PluginError, UsageError
from phireg.files.json import read_json_object
from phireg.files.kinds import MANIFEST
from phireg.verification.result import Verification

PROMPT_END = " TL;DR: "
"""What an article of the demo models is followed by; then comes its summary."""

MAX_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Article:
    """An article that the model has not seen in training, and its reference summary."""

    text: str
    reference: str

    @property
    def prompt(self) -> str:
        """What the model continues."""
        return self.text + PROMPT_END


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A family's demo model.

    Attributes:
        family: the family's name.
        directory: config.json, weights and tokenizer, as of a published model.
        articles: the held-back test split.
        scores: what its authors measured on that split (card.json); empty if they say nothing.
    """

    family: str
    directory: Path
    articles: tuple[Article, ...]
    scores: dict[str, Any]


def find(family: str) -> DemoModel:
    """The demo model that a family brings along.

    Args:
        family: name, or ``DISTRIBUTION:FAMILY``.

    Raises:
        PluginError: there is no such family, it has no demo, or the demo is damaged.
    """
    chosen = registry.load(family).family
    if chosen.demo is None:
        raise PluginError(
            f"family '{chosen.name}' brings no demo model",
            hint="convert a model of your own: phireg convert --model-dir DIR --output-dir CKPT",
        )
    directory = _directory(chosen.name, chosen.demo)
    card = directory / "card.json"
    scores = read_json_object(card).get("held_back") if card.exists() else None
    return DemoModel(
        chosen.name,
        directory,
        tuple(_articles(chosen.name, directory / "heldback.jsonl")),
        scores if isinstance(scores, dict) else {},
    )


def families() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The families that bring a demo model, and what is wrong with those that cannot be loaded."""
    names, problems = [], []
    for name in registry.index():
        try:
            if registry.load(name).family.demo is not None:
                names.append(name)
        except PluginError as error:
            problems.append(str(error))
    return tuple(names), tuple(problems)


def _directory(family: str, place: str) -> Path:
    package, _, name = place.partition(":")
    try:
        found = resources.files(package) / name
    except (ImportError, TypeError, ValueError) as error:
        raise PluginError(f"the demo of family '{family}' ({place}): {error}") from error
    if not isinstance(found, Path) or not name or not found.is_dir():
        raise PluginError(
            f"the demo of family '{family}' ({place}) is not a directory of an installed package",
            hint="its package must list the files as package data, and be installed unpacked.",
        )
    return found


def _articles(family: str, path: Path) -> Iterator[Article]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        pairs = [(row["article"], row["highlights"]) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PluginError(
            f"the demo of family '{family}' is damaged: {path}: {type(error).__name__}: {error}",
            hint="install the package again.",
        ) from error
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise PluginError(f"the demo of family '{family}' is damaged: {path} has no texts")
    for text, reference in pairs:
        yield Article(text, reference)


def article(model: DemoModel, number: int) -> Article:
    """A held-back article, counted from 0.

    Raises:
        UsageError: there are not so many.
    """
    if not 0 <= number < len(model.articles):
        raise UsageError(
            f"{model.family}'s demo has no article {number}",
            hint=f"they are numbered 0 to {len(model.articles) - 1}.",
        )
    return model.articles[number]


def convert(model: DemoModel, output_dir: Path, tp_size: int = 1) -> Converted:
    """Convert a demo model; a checkpoint of phireg's under that name is replaced.

    Raises:
        OutputError: there is something else under that name.
        PhiregError: as :func:`phireg.planning.plan` and :func:`phireg.conversion.convert`.
    """
    ours = (output_dir / MANIFEST).is_file()
    if not ours and output_dir.is_dir() and any(output_dir.iterdir()):
        raise OutputError(
            f"{output_dir} exists, and phireg did not make what is in it",
            hint="give --output-dir another place.",
        )
    plan = phireg.plan(model.directory, family=model.family, tp_size=tp_size)
    return phireg.convert(plan, output_dir, overwrite=ours)


def verify(model: DemoModel, checkpoint_dir: Path) -> Verification:
    """All checks of :func:`phireg.verification.verify`."""
    return phireg.verify(checkpoint_dir, model.directory, family=model.family)


def summarize(checkpoint_dir: Path, articles: Sequence[Article]) -> list[str]:
    """Greedy summaries by the executor, on the CPU in float32.

    Raises:
        PluginError: the checkpoint carries no tokenizer.
        PhiregError: as :func:`phireg.executor.load`.
    """
    from phireg.executor import generate, load
    from phireg.generation.tokenizer import find_tokenizer, stop_ids

    tokenizer = find_tokenizer(checkpoint_dir)
    if tokenizer is None:
        raise PluginError("the demo model has no tokenizer", hint="install its package again.")
    prompts = [tokenizer.encode(one.prompt) for one in articles]
    model = load(checkpoint_dir, dtype="float32")
    rows = generate(model, prompts, MAX_NEW_TOKENS, stop_ids(checkpoint_dir, tokenizer))
    return [tokenizer.decode(row) for row in rows]
