"""Which samples a report is measured on."""

import json

import pytest

from phireg.calibration.settings import Settings
from phireg.data.samples import read_samples
from phireg.quality.run import choose_text

LIMITS = {"vocab_size": 100, "longest": 50}


def samples_of(settings):
    return read_samples(settings.source, list, size=None, max_length=50, vocab_size=100)


@pytest.fixture
def data(tmp_path):
    """Settings with ten rows of five ids, and what is recorded of a calibration on the first."""
    path = tmp_path / "ids.jsonl"
    rows = [[10 * n, 10 * n + 1, 2, 3, 4] for n in range(10)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    settings = Settings(file=path)

    def calibrated(count):
        samples = samples_of(settings).first(count)
        return {"samples": count, "data_digest": samples.digest}

    return settings, rows, calibrated


def chosen(settings, provenance, tokens=1000):
    return choose_text(settings, provenance, list, tokens=tokens, **LIMITS)


def test_samples_behind_those_of_the_calibration(data):
    settings, rows, calibrated = data
    text = chosen(settings, calibrated(7))
    assert [list(row) for row in text.rows] == rows[7:]
    assert (text.origin, text.calibrated) == (str(settings.file), False)


def test_the_first_ones_where_none_are_left(data):
    settings, rows, calibrated = data
    text = chosen(settings, calibrated(10))
    assert [list(row) for row in text.rows] == rows
    assert text.calibrated


@pytest.mark.parametrize("provenance", [None, {"samples": 4, "data_digest": "of other text"}])
def test_all_of_a_text_that_was_not_calibrated_on(data, provenance):
    settings, rows, _ = data
    text = chosen(settings, provenance)
    assert [list(row) for row in text.rows] == rows
    assert not text.calibrated


def test_no_more_tokens_than_allowed(data):
    settings, rows, calibrated = data
    text = chosen(settings, calibrated(2), tokens=12)
    assert [list(row) for row in text.rows] == [rows[2], rows[3], rows[4][:2]]
    assert len(chosen(settings, calibrated(2), tokens=11).rows) == 2  # one token predicts nothing


def test_more_samples_than_a_calibration_takes(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [1, n % 90, 5]}) + "\n" for n in range(520)))
    settings = Settings(file=path)
    samples = samples_of(settings)
    provenance = {"samples": len(samples.rows), "data_digest": samples.digest}
    assert provenance["samples"] == 512
    text = chosen(settings, provenance)
    assert text.rows == tuple((1, n % 90, 5) for n in range(512, 520))
    assert (text.origin, text.calibrated) == (str(path), False)
