"""Endless short generated news articles with reference summaries.

An article reports one event among unrelated news: who, where, when, why, how much. Its sentences
have random order and several wordings; the summary states the facts in one fixed wording. To write
it, a model must find the right name, place, day and sum among several, sometimes from far back.

Training and held-back articles share no person: a full name belongs to one of the two.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from string import Formatter

from words import ASIDES, DAYS, FIRST_NAMES, LAST_NAMES, MONTHS, PLACES, TOPICS, Topic

TLDR = " TL;DR: "
BRIEF_SHARE = 0.15


@dataclass(frozen=True)
class Example:
    """An article and its summary.

    Attributes:
        article: the text to summarize.
        summary: the reference summary, two sentences; one for a brief article.
        facts: the facts stated in the summary, by name, spelled as in the article.
        person: the full name of the person in the news, or None in a brief article.
    """

    article: str
    summary: str
    facts: dict[str, str]
    person: str | None


def is_held_back(first: int, last: int) -> bool:
    """Return whether a full name (indices in the lists of names) is kept from training."""
    return (first + 3 * last) % 7 == 0


def training_articles(seed: int) -> Iterator[Example]:
    """Yield articles for training, some of them brief: the event and one unrelated sentence."""
    rng = random.Random(f"training {seed}")
    while True:
        yield _example(rng, held_back=False, brief=rng.random() < BRIEF_SHARE)


def held_back_articles(seed: int) -> Iterator[Example]:
    """Yield full articles about people that no training article mentions."""
    rng = random.Random(f"held back {seed}")
    while True:
        yield _example(rng, held_back=True, brief=False)


def _example(rng: random.Random, *, held_back: bool, brief: bool) -> Example:
    topic = rng.choice(TOPICS)
    facts = _facts(rng, topic, held_back)
    lead = rng.choice(topic.lead)
    if brief:
        needed, wordings, asides = topic.headline, [], 1
    else:
        needed = f"{topic.headline} {topic.detail}"
        wordings, asides = [rng.choice(wording) for wording in topic.details], rng.randint(2, 6)
    wordings += rng.sample(ASIDES, asides)
    rng.shuffle(wordings)
    # Mostly first, as in a newspaper.
    wordings.insert(0 if rng.random() < 0.7 else rng.randint(0, len(wordings)), lead)
    others = [_facts(rng, topic, held_back, avoid=facts) for _ in range(3)]
    sentences = []
    for wording in wordings:
        other = rng.choice(others)
        sentence = wording.format(**facts, **{f"{name}2": fact for name, fact in other.items()})
        sentences.append(sentence[0].upper() + sentence[1:])
    return Example(
        article=" ".join(sentences),
        summary=needed.format(**facts),
        facts={name: facts[name] for name in _fields(needed)},
        person=None if brief else facts["person"],
    )


def _facts(
    rng: random.Random, topic: Topic, held_back: bool, avoid: dict[str, str] | None = None
) -> dict[str, str]:
    """Draw a value for every fact, none of those in ``avoid``, so no sentence is ambiguous."""
    taken = set(avoid.values()) if avoid else set[str]()

    def draw(values: tuple[str, ...]) -> str:
        value = rng.choice(values)
        while value in taken:
            value = rng.choice(values)
        taken.add(value)
        return value

    def name() -> str:
        while True:
            first, last = rng.randrange(len(FIRST_NAMES)), rng.randrange(len(LAST_NAMES))
            full = f"{FIRST_NAMES[first]} {LAST_NAMES[last]}"
            if is_held_back(first, last) == held_back and full not in taken:
                taken.add(full)
                return full

    number = str(rng.randint(2, 99) * 10 if rng.random() < 0.5 else rng.randint(101, 999))
    unit = rng.choice((" crowns", " crowns", " thousand crowns", " million crowns"))
    return {
        **{key: rng.choice(values) for key, values in topic.words.items()},
        **{"person": name(), "rival": name(), "place": draw(PLACES), "other": draw(PLACES)},
        **{"day": draw(DAYS), "month": draw(MONTHS)},
        "amount": number if avoid or not topic.money else number + unit,
    }


def _fields(wording: str) -> list[str]:
    return [field for _, field, _, _ in Formatter().parse(wording) if field]
