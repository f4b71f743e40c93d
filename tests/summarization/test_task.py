"""Prompts, truncation and the choice of articles, by hand."""

import sys
from unittest.mock import Mock, call

import pytest
from tokenizers import processors

from phireg import demo
from phireg.data import rows as data_rows
from phireg.data.row import Row
from phireg.data.rows import Data
from phireg.errors import SourceError, UsageError
from phireg.generation.tokenizer import Tokenizer, find_tokenizer
from phireg.summarization.task import (
    Settings,
    load_articles,
    make_samples,
    prompt_text,
    samples_digest,
)


class Words:
    """One token for each word, after a token that every text begins with."""

    def encode(self, text, max_length):
        return [1, *(10 + len(word) for word in text.split()[1 - max_length :])]


def rows(*articles):
    return [Row(f"row {n}", {"article": a, "highlights": "r"}) for n, a in enumerate(articles)]


@pytest.mark.parametrize(
    ("article", "prompt"),
    [
        ("One.", "One. TL;DR:"),
        ("  It did n't rain.\n", "It didn't rain.\n TL;DR:"),
        ("", "TL;DR:"),
    ],
)
def test_prompt(article, prompt):
    assert prompt_text(article) == prompt


def test_the_first_articles_in_order():
    settings = Settings(batch_size=2, max_ite=2)
    samples = make_samples(rows(*"abcdef"), Words(), settings)
    assert [sample.article for sample in samples] == ["a", "b", "c", "d"]
    assert samples[0].prompt == (1, 11, 16)


def test_short_articles_are_left_out_and_not_counted():
    settings = Settings(max_ite=2, min_input_length=3)
    samples = make_samples(rows("a", "b c", "d", "e f", "g h"), Words(), settings)
    assert [sample.where for sample in samples] == ["row 1", "row 3"]
    with pytest.raises(UsageError, match="no article"):
        make_samples(rows("a"), Words(), settings)


def test_a_long_article_loses_its_beginning():
    tokenizer = find_tokenizer(demo.find("phi3-mini").directory)
    article = demo.find("phi3-mini").articles[0].text
    whole = tokenizer.encode(prompt_text(article))
    (sample,) = make_samples(rows(article), tokenizer, Settings(max_input_length=20))
    assert list(sample.prompt) == whole[-20:]
    assert tokenizer.decode(sample.prompt).endswith("TL;DR:")
    # Cutting one text does not cut the next one.
    assert tokenizer.encode(prompt_text(article)) == whole


def test_special_tokens_stay_when_a_text_is_cut():
    tokenizer = find_tokenizer(demo.find("phi3-mini").directory)
    inner = tokenizer._inner
    eos = inner.eos_token
    inner._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{eos} $A", special_tokens=[(eos, inner.eos_token_id)]
    )
    whole = Tokenizer(inner).encode("The mill in Oakfield closed")
    assert whole[0] == inner.eos_token_id
    assert Tokenizer(inner).encode("The mill in Oakfield closed", 3) == [whole[0], *whole[-2:]]


def test_the_digest_sees_every_text_and_prompt():
    digest = samples_digest(make_samples(rows("a b", "c"), Words(), Settings()))
    for other in (rows("a b", "d"), rows("c", "a b"), rows("a b")):
        assert samples_digest(make_samples(other, Words(), Settings())) != digest


@pytest.fixture
def public(monkeypatch):
    """A mock of cnn_dailymail, which gives one row."""
    load = Mock(return_value=Data("cnn", rows("a")))
    monkeypatch.setattr(data_rows, "cnn_dailymail", load)
    monkeypatch.setattr(data_rows, "_unavailable", lambda: None)
    return load


@pytest.mark.parametrize("family", ["phi2", "phi3-mini", "phi3-small", "phi3-medium"])
def test_a_demo_model_gets_its_own_articles(family, public):
    model = demo.find(family)
    data = load_articles("auto", 3, [model.directory])
    assert [row.values["article"] for row in data.rows] == [a.text for a in model.articles]
    assert data.note is None
    public.assert_not_called()


def test_another_model_gets_cnn_dailymail(public, tmp_path):
    assert load_articles("auto", 3, [tmp_path]).name == "cnn"
    below = tmp_path / "ccdv" / "cnn_dailymail"
    load_articles("auto", 3, [], str(tmp_path))
    below.mkdir(parents=True)
    load_articles("auto", 3, [], str(tmp_path))
    copies = [call("test", 3, str(directory)) for directory in (tmp_path, below)]
    assert public.call_args_list == [call("test", 3), *copies]

    public.side_effect = UsageError("no network")
    data = load_articles("auto", 3, [tmp_path])
    assert "held-back" in data.name
    assert "no network" in data.note
    for choice, directory in (("cnn_dailymail", None), ("auto", str(tmp_path))):
        with pytest.raises(UsageError, match="no network"):
            load_articles(choice, 3, [], directory)


def test_scores_that_are_checked_never_come_from_a_substitute(monkeypatch, tmp_path):
    monkeypatch.setattr(data_rows.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_articles("auto", 3, [tmp_path]).note is not None
    with pytest.raises(SourceError, match="datasets") as caught:
        load_articles("auto", 3, [tmp_path], checked=True)
    assert "pip install" in caught.value.hint
    assert "--dataset FILE" in caught.value.hint
    # Articles that are named, and a demo model's own, are no substitutes.
    own = load_articles("auto", 3, [demo.find("phi2").directory], checked=True)
    assert len(own.rows) == len(load_articles("demo", 3, [tmp_path], checked=True).rows)
