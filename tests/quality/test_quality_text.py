"""Which samples a report is measured on."""

import json

import pytest

from phireg.calibration.settings import Settings
from phireg.data.samples import read_samples
from phireg.quality.run import choose_text


def encode(names, contents, most):
    return [list(content[:most]) for content in contents]


ROWS = [[10 * n, 10 * n + 1, 2, 3, 4] for n in range(10)]


def write(path, rows):
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return Settings(file=path)


def calibrated_on(settings, count):
    """What is recorded of a calibration on the first samples."""
    samples = read_samples(settings.source, encode, size=None, max_length=50, vocab_size=100)
    return {"samples": count, "data_digest": samples.first(count).digest}


def chosen(settings, provenance, tokens=1000):
    text = choose_text(settings, provenance, encode, vocab_size=100, longest=50)
    return text.cut(tokens, longest=50)


@pytest.mark.parametrize(
    ("provenance", "tokens", "expected", "calibrated"),
    [
        (7, 1000, ROWS[7:], False),
        (10, 1000, ROWS, True),
        (None, 1000, ROWS, False),
        ({"samples": 4, "data_digest": "of other text"}, 1000, ROWS, False),
        (2, 12, [ROWS[2], ROWS[3], ROWS[4][:2]], False),
        (2, 11, ROWS[2:4], False),  # one token predicts nothing
    ],
)
def test_samples_behind_those_of_the_calibration(
    provenance, tokens, expected, calibrated, tmp_path
):
    settings = write(tmp_path / "ids.jsonl", ROWS)
    if isinstance(provenance, int):
        provenance = calibrated_on(settings, provenance)
    text = chosen(settings, provenance, tokens)
    assert list(map(list, text.rows)) == expected
    assert (text.origin, text.calibrated) == (str(settings.file), calibrated)


def test_more_samples_than_a_calibration_takes(tmp_path):
    settings = write(tmp_path / "ids.jsonl", [[1, n % 90, 5] for n in range(520)])
    text = chosen(settings, calibrated_on(settings, 512))
    assert text.rows == tuple((1, n % 90, 5) for n in range(512, 520))
    assert not text.calibrated
