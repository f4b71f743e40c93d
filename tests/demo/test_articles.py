"""The demo models' articles: repeatable, answerable, and split without overlap."""

import re
import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "demo_models"


@pytest.fixture(scope="module")
def demo(script):
    return script("articles"), script("words")


@pytest.fixture(scope="module")
def training(demo):
    return list(islice(demo[0].training_articles(0), 3000))


@pytest.fixture(scope="module")
def held_back(demo):
    return list(islice(demo[0].held_back_articles(0), 1000))


def test_the_same_in_every_process(demo):
    code = "from itertools import islice; from articles import *; print(*islice({}(5), 20))"
    for name in ("training_articles", "held_back_articles"):
        first, second = (
            subprocess.run(
                [sys.executable, "-c", code.format(name)],
                cwd=SCRIPTS,
                env={"PYTHONHASHSEED": hash_seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for hash_seed in ("1", "2")
        )
        assert first == second
        here = list(islice(getattr(demo[0], name)(5), 20))
        assert " ".join(map(str, here)) == first.strip()
        assert here != list(islice(getattr(demo[0], name)(6), 20))


def test_no_name_of_a_held_back_article_is_in_training(demo, training, held_back):
    words = demo[1]
    names = {f"{a} {b}" for a, b in product(words.FIRST_NAMES, words.LAST_NAMES)}

    def named(examples):
        text = " ".join(example.article for example in examples)
        pairs = re.findall(r"(?=\b([A-Z]\w+ [A-Z]\w+)\b)", text)
        return names.intersection(pairs)

    in_training, in_test = named(training), named(held_back)
    assert len(in_training) > 2000 and len(in_test) > 400
    assert not in_training & in_test


def test_a_summary_states_facts_of_its_article(training, held_back):
    for example in (*training, *held_back):
        article = example.article.lower()
        for name, fact in example.facts.items():
            assert fact.lower() in article, (name, example)
            assert fact.lower() in example.summary.lower(), (name, example)
        assert not re.search(r"[{}]|  ", example.article + example.summary)
        assert example.summary[0].isupper() and example.summary[-1] == "."


def test_brief_articles_are_for_training_only(training, held_back):
    brief = [example for example in training if example.person is None]
    assert 0.1 < len(brief) / len(training) < 0.2
    for example in held_back:
        assert example.person
        assert example.person in example.article and example.person in example.summary
