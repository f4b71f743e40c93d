"""Demo models: small trained models that come with their families."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import phireg
from phireg import registry
from phireg.checkpoint.manifest import check_files, read_manifest
from phireg.conversion.convert import Converted, write_checkpoint
from phireg.errors import OutputError, PluginError, SourceError, UsageError
from phireg.files.json import read_json_object
from phireg.files.kinds import BUILD_FILE, MANIFEST
from phireg.files.regular import Limit, read_file
from phireg.planning.model import Plan

PROMPT_END = " TL;DR: "
"""The text between an article and its summary, in the training of the demo models."""

MAX_NEW_TOKENS = 64

NOTE = "phireg demo builds it"
"""Among the notes of an engine's manifest, by which a demo knows its own."""

_TOKENIZERS = ("tokenizer.json", "cl100k_base.tiktoken")


@dataclass(frozen=True, slots=True)
class Article:
    """An article that was not in the model's training, and its reference summary."""

    text: str
    reference: str

    @property
    def prompt(self) -> str:
        """The prompt for a summary."""
        return self.text + PROMPT_END


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A family's demo model, in the files of a published one."""

    family: str
    directory: Path
    articles: tuple[Article, ...]  # the held-back test split
    scores: dict[str, Any]  # measured on it by the model's authors (card.json); may be empty

    def article(self, number: int) -> Article:
        """Return a held-back article, counted from 0."""
        if not 0 <= number < len(self.articles):
            raise UsageError(
                f"{self.family}'s demo has no article {number}",
                hint=f"they are numbered 0 to {len(self.articles) - 1}.",
            )
        return self.articles[number]


def families() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the families with a demo model, and a message for each broken family."""
    names, problems = [], []
    for name in registry.index():
        try:
            if registry.load(name).family.demo is not None:
                names.append(name)
        except PluginError as error:
            problems.append(str(error))
    return tuple(names), tuple(problems)


def find(family: str) -> DemoModel:
    """Return the demo model of a family (name, or ``DISTRIBUTION:FAMILY``)."""
    loaded = registry.load(family).family
    if loaded.demo is None:
        raise PluginError(
            f"family '{loaded.name}' has no demo model",
            hint="convert a model of your own: phireg convert --model-dir DIR --output-dir CKPT",
        )
    directory = _directory(loaded.name, loaded.demo)
    articles = _articles(loaded.name, directory / "heldback.jsonl")
    card = directory / "card.json"
    scores = read_json_object(card).get("held_back") if card.is_file() else None
    return DemoModel(loaded.name, directory, articles, scores if isinstance(scores, dict) else {})


def family_of(directories: Iterable[Path]) -> str | None:
    """Find the family whose demo model, or what was made of it, is in a directory.

    Known by the tokenizer, which no other model has. Some families have the same: a checkpoint's
    manifest or a config.json like the demo's decides among them, else the first is returned.
    """
    found: list[tuple[bool, str]] = []
    for family, path in product(families()[0], directories):
        with suppress(PluginError):  # a damaged demo model stops nobody
            original = find(family).directory
            if _alike(original, path, _TOKENIZERS, Limit.TOKENIZER):
                same = _alike(original, path, ("config.json",), Limit.JSON)
                found.append((same or family == _written_by(path), family))
    return max(found, key=itemgetter(0), default=(False, None))[1]


def _written_by(checkpoint_dir: Path) -> object:
    with suppress(SourceError):
        block = (read_manifest(checkpoint_dir) or {}).get("family")
        return block.get("name") if isinstance(block, dict) else None
    return None


def _alike(directory: Path, other: Path, names: Iterable[str], limit: Limit) -> bool:
    """Return whether two directories have one of the files, with the same bytes."""
    pairs = ((directory / name, other / name) for name in names)
    return any(
        read_file(own, limit) == read_file(file, limit)
        for own, file in pairs
        if own.is_file() and file.is_file()
    )


def _directory(family: str, location: str) -> Path:
    package, _, name = location.partition(":")
    try:
        directory = resources.files(package) / name
    except (ImportError, TypeError, ValueError) as error:
        raise PluginError(f"the demo of family '{family}' ({location}): {error}") from error
    if not isinstance(directory, Path) or not name or not directory.is_dir():
        raise PluginError(
            f"the demo of family '{family}' ({location}) is not a directory of an installed "
            "package",
            hint="its package must list the files as package data, and be installed unpacked.",
        )
    return directory


def _articles(family: str, path: Path) -> tuple[Article, ...]:
    try:
        lines = read_file(path, Limit.ROWS).decode("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        articles = tuple(Article(row["article"], row["highlights"]) for row in rows)
    except (SourceError, ValueError, TypeError, KeyError) as error:
        raise PluginError(
            f"the demo of family '{family}' is damaged: {path}: {type(error).__name__}: {error}",
            hint="install the package again.",
        ) from error
    texts = [text for article in articles for text in (article.text, article.reference)]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PluginError(f"the demo of family '{family}' is damaged: {path} has no texts")
    return articles


def convert(model: DemoModel, output_dir: Path, tp_size: int = 1) -> Converted:
    """Convert a demo model, replacing an earlier conversion of it and nothing else."""
    plan = phireg.plan(model.directory, family=model.family, tp_size=tp_size)
    is_replacing = output_dir.is_dir() and any(output_dir.iterdir())
    if is_replacing and (problem := _objection(plan, output_dir)):
        raise _not_a_demo(output_dir, problem)
    return write_checkpoint(
        plan, output_dir, overwrite=is_replacing, allow_overflow=False, progress=None, demo=True
    )


def check_engine_dir(engine_dir: Path) -> None:
    """Refuse a directory that is neither free nor an engine that a demo built."""
    from phireg.tensorrt.engine import is_native
    from phireg.tensorrt.inspection import inspect_engine

    if not engine_dir.exists() or (engine_dir.is_dir() and not any(engine_dir.iterdir())):
        return
    problem: str | None = "it is not an engine of TensorRT for RTX"
    if is_native(engine_dir):
        inspection = inspect_engine(engine_dir, check=True)
        problem = "; ".join(inspection.problems) or None
        if NOTE not in str(inspection.engine.manifest.get("notes")):
            problem = f"its {BUILD_FILE} does not say so"
    if problem is not None:
        raise _not_a_demo(engine_dir, problem)


def _not_a_demo(directory: Path, problem: str) -> OutputError:
    return OutputError(
        f"{directory} exists, and phireg demo did not make it: {problem}",
        hint="choose another --output-dir.",
    )


def _objection(plan: Plan, directory: Path) -> str | None:
    """Return what in a directory is not of a demo, by its manifest; None if it is one."""
    manifest = read_manifest(directory)
    if manifest is None:
        return f"there is no {MANIFEST}"
    if manifest.get("demo") is not True:
        return f"its {MANIFEST} does not say so"
    if _written_by(directory) != plan.family:
        return "it was made from another model"
    if more := {path.name for path in directory.iterdir()} - {MANIFEST, *manifest["files"]}:
        return f"{MANIFEST} does not list {min(more)}"
    return next(check_files(directory, manifest), None)


def summarize(checkpoint_dir: Path, articles: Sequence[Article]) -> list[str]:
    """Write greedy summaries with the executor, on the CPU in float32."""
    from phireg.executor import generate, load
    from phireg.generation.tokenizer import find_tokenizer, stop_ids

    tokenizer = find_tokenizer(checkpoint_dir)
    if tokenizer is None:
        raise PluginError("the demo model has no tokenizer", hint="install its package again.")
    prompts = [tokenizer.encode(article.prompt) for article in articles]
    model = load(checkpoint_dir, dtype="float32")
    rows = generate(model, prompts, MAX_NEW_TOKENS, stop_ids(checkpoint_dir, tokenizer))
    return [tokenizer.decode(row) for row in rows]
