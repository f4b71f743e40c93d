"""Samples from files, the public dataset and the built-in text."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, call

import pytest

from phireg.data import rows as data
from phireg.data.row import Row
from phireg.data.rows import Data
from phireg.data.samples import read_samples
from phireg.errors import PhiregError, UsageError

ROOT = Path(__file__).parents[2]


def ids_of(text):
    """One id per character, behind a special token."""
    return [1, *(2 + ord(letter) % 90 for letter in text)]


def encode(names, contents, most, ids_of=ids_of):
    return [list(c if isinstance(c, tuple) else ids_of(c))[:most] for c in contents]


def as_bytes(names, contents, most):
    return encode(names, contents, most, lambda text: list(text.encode()))


def read(source, encode=encode, vocab_size=100, size=None, max_length=512):
    return read_samples(
        str(source), encode, size=size, max_length=max_length, vocab_size=vocab_size
    )


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_are_taken_as_they_are(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"input_ids": [99, 0, 5]}, {"input_ids": [7], "text": "no"})
    samples = read(path)
    assert samples.rows == ((99, 0, 5), (7,))
    assert samples.tokens == 4
    assert samples.origin == str(path)
    assert samples.first(1).rows == ((99, 0, 5),)
    assert samples.digest != samples.first(1).digest
    other = jsonl(tmp_path / "y.jsonl", {"input_ids": [99, 0]}, {"input_ids": [5, 7]})
    assert read(other).digest != samples.digest


@pytest.mark.parametrize("key", ["text", "article", "prompt"])
def test_text_under_each_key(tmp_path, key):
    path = jsonl(tmp_path / "x.jsonl", {"highlights": "no", key: "ab"}, {key: "abcdef"})
    samples = read(path, max_length=4)
    assert samples.rows == tuple(tuple(ids_of(t)) for t in ("ab", "abc"))


def test_the_first_ones_in_order(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", *({"input_ids": [n]} for n in range(20)))
    assert read(path, size=3).rows == ((0,), (1,), (2,))
    short = read(path, size=30)
    assert len(short.rows) == 20
    assert "has 20 samples, not 30" in short.origin
    path = jsonl(tmp_path / "y.jsonl", {"input_ids": list(range(50))})
    assert len(read(path, max_length=20).rows[0]) == 20


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1, 100]},
        {"input_ids": [-1]},
        {"input_ids": []},
        {"input_ids": "1 2"},
        {"input_ids": 7},
        {"input_ids": None},
        {"input_ids": [1, 2.0]},
        {"input_ids": [True]},
        {"text": "  "},
        {"text": 5},
        {"question": "why"},
        {},
    ],
)
def test_damaged_rows_are_named(tmp_path, row):
    path = jsonl(tmp_path / "x.jsonl", {"text": "whole"}, row)
    with pytest.raises(UsageError, match=f"^{path}:2: "):
        read(path)
    with pytest.raises(UsageError, match=f"^{path}:1: "):
        read(jsonl(path, {"text": "whole"}), vocab_size=5)  # the tokenizer of another model


def test_the_built_in_text():
    samples = read("builtin", as_bytes, 256)
    assert samples.origin == "the built-in text"
    assert 20 < len(samples.rows) < 60
    lengths = [len(row) for row in samples.rows]
    assert all(length <= 512 for length in lengths)
    assert lengths.count(512) > len(lengths) - 4
    texts = [bytes(row).decode(errors="ignore") for row in samples.rows]
    assert len({text[:40] for text in texts}) == len(texts)
    assert not any("---" in text for text in texts)
    few = read("builtin", as_bytes, 256, size=2)
    assert few.rows == samples.rows[:2]
    many = read("builtin", as_bytes, 256, size=500)
    assert f"has {len(texts)} samples, not 500" in many.origin


ARTICLES = [Row(f"row {n}", {"article": f"article {n}", "highlights": "no"}) for n in range(9)]


def test_the_public_dataset(monkeypatch, tmp_path):
    load = Mock(side_effect=lambda split, count, directory=None: Data("cnn", ARTICLES[:count]))
    monkeypatch.setattr(data, "cnn_dailymail", load)
    samples = read("cnn_dailymail", size=2)
    assert samples.rows == (tuple(ids_of("article 0")), tuple(ids_of("article 1")))
    assert samples.origin == "cnn"
    read(tmp_path)
    assert load.call_args_list == [call("train", 2), call("train", 512, str(tmp_path))]
    monkeypatch.setattr(data, "_unavailable", lambda: None)
    assert read("auto", size=1).rows == samples.rows[:1]
    with pytest.raises(UsageError, match="'pile'"):
        read("pile")


def test_only_auto_is_replaced(monkeypatch):
    missing = PhiregError("cannot be loaded")
    monkeypatch.setattr(data, "cnn_dailymail", Mock(side_effect=missing))
    monkeypatch.setattr(data, "_unavailable", lambda: None)
    with pytest.raises(PhiregError, match="cannot be loaded"):
        read("cnn_dailymail")
    assert read("auto").origin == "the built-in text, because cannot be loaded"


def test_without_a_network_the_built_in_text_is_taken_and_said(monkeypatch):
    for name in data._PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(socket, "create_connection", Mock(side_effect=OSError("no route")))
    assert read("auto").origin == "the built-in text, because hub.invalid cannot be reached"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read("auto").origin == "the built-in text, because HF_HUB_OFFLINE is set"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "'datasets' is not installed" in read("auto").origin


@pytest.mark.parametrize(
    "module", ["data.samples", "calibration.statistics", "calibration.settings"]
)
def test_torch_is_not_needed(module):
    code = f"import sys, phireg.{module}; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ran.stdout == "False\n"
