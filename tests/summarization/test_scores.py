"""ROUGE by hand, and by rouge-score as evaluate's metric uses it; thresholds."""

import math

import numpy as np
import pytest
from rouge_score import rouge_scorer, scoring

from phireg.summarization.result import ROUGES, Check, perplexity, rouge


def test_by_hand():
    # Common words: the, cat, sat (3 of 4 and of 5); common pairs: "the cat", "cat sat".
    scores = rouge(["The cat sat there."], ["the cat sat on mats"])
    one, two = 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5), 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert scores.total["rouge1"] == pytest.approx(100 * one)
    assert scores.total["rouge2"] == pytest.approx(100 * two)
    assert scores.total["rougeL"] == scores.total["rougeLsum"] == pytest.approx(100 * one)


@pytest.mark.parametrize(
    ("summary", "reference", "expected"),
    [
        ("b a", "a b", [100, 0, 50, 50]),  # order counts for the subsequence only
        ("cats sit", "cat sits", [0, 0, 0, 0]),  # no stemming
        ("c d\na b", "a b\nc d", [100, 200 / 3, 50, 100]),  # rougeLsum takes line by line
        ("", "a b", [0, 0, 0, 0]),
    ],
)
def test_order_stems_and_lines(summary, reference, expected):
    scores = rouge([summary], [reference]).total
    assert [scores[name] for name in ROUGES] == pytest.approx(expected)


def test_as_evaluate_does():
    rng = np.random.default_rng(3)
    words = list("abcdefghij")
    texts = [[" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(7)] for _ in "xy"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    aggregator = scoring.BootstrapAggregator()
    each = [scorer.score(reference, ours) for ours, reference in zip(*texts, strict=True)]
    for scores in each:
        aggregator.add_scores(scores)
    np.random.seed(0)
    expected = {name: score.mid.fmeasure for name, score in aggregator.aggregate().items()}
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    scores = rouge(*texts)
    assert scores.total == pytest.approx({k: 100 * v for k, v in expected.items()}, abs=1e-12)
    assert [a["rouge2"] for a in scores.articles] == [100 * s["rouge2"].fmeasure for s in each]
    assert np.random.get_state()[1].tolist() == before


def test_perplexity():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(
    ("metric", "value", "passed"),
    [
        ("rouge1", 15.01, True),
        ("rouge1", 15.0, False),
        ("rouge1", math.nan, False),
        ("perplexity", 14.99, True),
        ("perplexity", 15.0, False),
        ("perplexity", math.nan, False),
        ("perplexity", None, False),
    ],
)
def test_thresholds_are_strict(metric, value, passed):
    check = Check("executor", metric, value, 15.0)
    assert check.passed == passed
    assert metric in str(check)
    assert "15" in str(check)
