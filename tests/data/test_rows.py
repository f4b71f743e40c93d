"""Data files of every kind, whole and damaged."""

import json
import sys
import tracemalloc
from unittest.mock import Mock

import pyarrow
import pytest
from pyarrow import parquet

from phireg.data.formats import read_rows
from phireg.data.row import Row
from phireg.data.rows import cnn_dailymail
from phireg.errors import PhiregError, SourceError, UsageError

VALUES = [
    {"article": 'One, "quoted"\nover two lines', "highlights": "ü"},
    {"article": "Two", "highlights": "日本"},
]


def write_jsonl(path):
    path.write_text("\n\n".join(json.dumps(row) for row in VALUES) + "\n")
    return ["1", "3"]


def write_csv(path):
    text = 'article,highlights\r\n"One, ""quoted""\nover two lines",ü\r\n\r\nTwo,日本\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return ["2", "5"]


def write_parquet(path):
    parquet.write_table(pyarrow.Table.from_pylist(VALUES), path)
    return ["1", "2"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.json", write_jsonl),
        ("a.CSV", write_csv),
        ("a.parquet", write_parquet),
    ],
)
def test_every_kind(name, write, tmp_path):
    path = tmp_path / name
    lines = write(path)
    assert read_rows(path) == [
        Row(f"{path}:{line}", row) for line, row in zip(lines, VALUES, strict=True)
    ]


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\r\n\n  \n{second\n")
    assert [row.values for row in read_rows(path)] == [{"text": "first"}, {"text": "{second"}]
    assert read_rows(path)[1].where == f"{path}:4"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ":2: "),
        ("a.jsonl", b'{"a": 1}\n[1]\n', ":2: "),
        ("a.jsonl", b"[" * 100_000, ":1: "),
        ("a.jsonl", b"\n \n", ""),
        ("a.txt", b"", ""),
        ("a.txt", b"good\nb\xffd", ":2: "),
        ("a.csv", b"a,b\n1,2\n3\n", ":3: "),
        ("a.csv", b'a,b\n1,"2', ":2: "),
        ("a.csv", b"a,b\n", ""),
        ("a.parquet", b"PAR1 and then nothing", ": "),
        ("a.xls", b"", ": "),
    ],
)
def test_damage_is_named(name, content, line, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_rows(path)
    assert caught.value.message.startswith(f"{path}{line}")


def test_a_parquet_file_is_unpacked_as_far_as_it_is_read(tmp_path):
    text = pyarrow.array(["x" * 1000]).dictionary_encode()
    table = pyarrow.table({"text": text.take(pyarrow.array([0] * 200_000))})
    parquet.write_table(table, tmp_path / "a.parquet")
    tracemalloc.start()
    rows = read_rows(tmp_path / "a.parquet", 70)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.where for row in rows[::69]] == [f"{tmp_path}/a.parquet:{n}" for n in (1, 70)]
    assert peak < 20_000_000


def test_missing_files_and_long_fields(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.txt"):
        with pytest.raises(UsageError, match=name):
            read_rows(tmp_path / name)
    path = tmp_path / "a.csv"
    path.write_text("article\n" + "x" * 200_000 + "\n")
    assert len(read_rows(path)[0].text("article")) == 200_000


@pytest.mark.parametrize("values", [{}, {"article": None}, {"article": 3}])
def test_a_value_that_is_no_text(values):
    with pytest.raises(UsageError, match=r"here:7: .*'article'"):
        Row("here:7", values).text("article")


def test_the_right_part_of_cnn_dailymail(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{**row, "id": "x"} for row in VALUES * 2])
    load = Mock(return_value=table)
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = cnn_dailymail("test", 3).rows
    load.assert_called_once_with("ccdv/cnn_dailymail", "3.0.0", split="test")
    assert [row.text("article")[:3] for row in rows] == ["One", "Two", "One"]
    assert len(cnn_dailymail("test", 9, "/elsewhere").rows) == 4
    load.assert_called_with("/elsewhere", "3.0.0", split="test", streaming=True)
    monkeypatch.setattr(datasets, "__version__", "3.1.0")
    cnn_dailymail("test", 3)
    load.assert_called_with("ccdv/cnn_dailymail", "3.0.0", split="test", trust_remote_code=False)


CARD = """---
configs:
- config_name: 3.0.0
  data_files:
  - split: test
    path: 3.0.0/test-*
---
"""


def test_a_copy_of_cnn_dailymail_is_data(tmp_path, monkeypatch):
    copy = tmp_path / "ccdv" / "cnn_dailymail"
    (copy / "3.0.0").mkdir(parents=True)
    (copy / "README.md").write_text(CARD)
    table = pyarrow.Table.from_pylist(VALUES * 1000)
    parquet.write_table(table, copy / "3.0.0" / "test-00000-of-00001.parquet")
    rows = cnn_dailymail("test", 3, str(copy)).rows
    assert [row.text("article")[:3] for row in rows] == ["One", "Two", "One"]
    # What lies in the current directory is not the hub's.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=str(copy)):
        cnn_dailymail("test", 3)
    (copy / "cnn_dailymail.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SourceError, match="script"):
        cnn_dailymail("test", 3, str(copy))
    assert not (tmp_path / "ran").exists()


def test_without_the_network_or_the_package(monkeypatch):
    datasets = pytest.importorskip("datasets")
    failure = ConnectionError("Couldn't reach it\nand more")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=failure))
    with pytest.raises(PhiregError, match=r"Couldn't reach it\n") as caught:
        cnn_dailymail("test", 3)
    assert "local file" in caught.value.hint
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PhiregError) as caught:
        cnn_dailymail("test", 3)
    assert "phireg[data]" in caught.value.hint
