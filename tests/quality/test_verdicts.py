"""The verdict of a quantization, and the intervals it is judged by."""

import math

import numpy as np
import pytest
from quality.results import made

from phireg.findings import UNMEASURED, Finding, Severity
from phireg.quality import estimates
from phireg.quality.estimates import Estimate, mean, share
from phireg.quality.result import settled


def test_a_mean_has_the_interval_of_its_blocks():
    """Of 32 blocks of 16 equal values: mean and spread of 32 independent ones, by hand."""
    values = np.array([0.0, 1.0] * 16)
    estimate = mean([np.repeat(values, 16)])
    half = 2.0395 * 0.5 * math.sqrt(32 / 31) / math.sqrt(32)  # Student's t for 31 degrees
    assert estimate.value == 0.5
    assert estimate.high - 0.5 == pytest.approx(half, rel=1e-3)
    assert 0.5 - estimate.low == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize(
    ("freedom", "point"), [(2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042), (500, 1.965)]
)
def test_students_points(freedom, point):
    assert estimates._student(freedom) == pytest.approx(point, rel=0.04)


def test_nineteen_of_twenty_intervals_hold_the_mean():
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(400):
        noise = generator.normal(size=(8, 128)).cumsum(axis=1)
        # Neighbors depend on each other: the mean of four values that move on by one.
        rows = [(noise[n, 4:] - noise[n, :-4]) / 4 for n in range(8)]
        estimate = mean(rows)
        hits += estimate.low <= 0 <= estimate.high
    assert 0.90 < hits / 400 < 0.99


def test_a_share_of_all_or_too_little():
    """Wilson's interval: 100 of 100 leave a share of 0.963 possible."""
    assert share([np.ones(100, bool)]) == Estimate(1.0, pytest.approx(0.963, abs=5e-4), 1.0)
    assert share([np.ones(20, bool)]) == Estimate(1.0, 0.0, 1.0)
    assert mean([np.array([1.0, math.inf])] * 9).value == math.inf


@pytest.mark.parametrize(
    ("top1", "kl", "verdict"),
    [
        ((0.98, 0.97, 0.99), (0.01, 0.009, 0.011), "close"),
        ((0.98, 0.97, 0.99), (0.05, 0.03, 0.07), "unclear"),
        ((0.89, 0.86, 0.92), (0.01, 0.009, 0.011), "unclear"),
        ((0.85, 0.83, 0.87), (0.01, 0.009, 0.011), "changed"),
        ((0.98, 0.97, 0.99), (0.3, 0.25, 0.35), "changed"),
        ((0.50, 0.45, 0.55), (0.3, 0.25, 0.35), "far"),
        ((0.98, 0.97, 0.99), (math.inf, math.inf, math.inf), "far"),
        ((0.98, 0.00, 1.00), (0.01, -math.inf, math.inf), "unclear"),
    ],
)
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int8_wo", "int4_wo"])
def test_one_scale_for_all_formats(top1, kl, verdict, qformat):
    quality = made(top1=Estimate(*top1), kl=Estimate(*kl), qformat=qformat)
    assert quality.verdict == verdict
    assert ("not enough text" in quality.summary) == (verdict == "unclear")


def test_better_than_the_original_is_no_defect():
    for change in (-0.2, -0.01, 0.0, 0.01):
        quality = made(nll_change=Estimate(change, change - 0.001, change + 0.001))
        assert quality.verdict == "close"
    assert "within what the text can tell" in made(nll_change=Estimate(0.1, -0.1, 0.3)).summary


def test_text_less_likely_than_chance_tells_nothing():
    assert made(unquantized_nll=math.log(999), vocab_size=1000).verdict == "close"
    quality = made(unquantized_nll=math.log(66_650), vocab_size=1000)
    assert quality.verdict == "uninformative"
    assert "66,650" in quality.summary
    assert "e+" not in quality.summary


@pytest.mark.parametrize(
    ("change", "text", "severity"),
    [
        ((0.001, -0.002, 0.004), {}, Severity.NOTE),
        ((0.015, 0.012, 0.0195), {}, Severity.NOTE),
        ((0.001, -0.02, 0.022), {}, Severity.WARNING),  # too little text to be sure
        ((0.366, 0.35, 0.38), {}, Severity.WARNING),  # what was reported: 8.51 of 5.90
        ((math.inf, math.inf, math.inf), {}, Severity.WARNING),
        ((0.0, -math.inf, math.inf), {}, Severity.WARNING),
        ((0.001, -0.002, 0.004), {"vocab_size": 2}, Severity.WARNING),  # guessing does better
    ],
)
def test_a_doubt_is_settled_by_the_whole_interval_of_the_perplexity(change, text, severity):
    doubt = Finding(Severity.NOTE, UNMEASURED, "KV cache of 8 bits", "reported: +44%")
    other = Finding(Severity.NOTE, "quant", "another", "stays")
    quality = made(nll_change=Estimate(*change), **text)
    finding = settled(doubt, quality)
    assert (finding.severity, finding.subject) == (severity, doubt.subject)
    assert settled(doubt, None).severity is Severity.WARNING
    assert settled(other, None) is other
