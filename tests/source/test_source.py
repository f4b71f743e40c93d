"""Sources are judged by what safetensors' own reader says about the same files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.damage import index
from helpers.tiny_phi3 import INDEX, make_tiny_phi3, shard_path, tiny_tensors
from safetensors.numpy import save_file

from phireg.errors import SourceError
from phireg.files import regular as files
from phireg.files.safetensors import read_header
from phireg.findings import Severity
from phireg.source.readings import open_source


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tiny_phi3(tmp_path / "model")
    return tmp_path / "model"


def read_all(reader, tensor, block: int = 1 << 30) -> bytes:
    data = bytearray(tensor.nbytes)
    view = memoryview(data)
    for start in range(0, tensor.nbytes, block):
        reader.read_into(tensor, start, view[start : start + block])
    return bytes(data)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def assert_holds(source, expected: dict[str, np.ndarray], block: int = 1 << 30) -> None:
    assert set(source.tensors) == set(expected)
    with source.open() as reader:
        for name, array in expected.items():
            tensor = source.tensors[name]
            assert (tensor.name, tensor.shape) == (name, array.shape)
            assert read_all(reader, tensor, block) == array.tobytes()


@pytest.mark.parametrize("block", [1 << 30, 7])
def test_sharded(model, block):
    source = open_source(model, "abc123")
    assert_holds(source, tiny_tensors(), block)
    assert source.revision == "abc123"
    assert source.directory == model
    assert source.findings == ()
    assert [f.name for f in source.files] == [shard_path(model, i).name for i in range(3)]
    for file in source.files:
        assert file.size == (model / file.name).stat().st_size
        assert file.header_digest == read_header(model / file.name).digest
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    assert {t.name: t.file for t in source.tensors.values()} == weight_map
    places = [(t.file, t.offset) for t in source.tensors.values()]
    assert places == sorted(places)
    with pytest.raises(TypeError):
        source.tensors["x"] = None


def test_single_file_without_index(tmp_path):
    arrays = {"a": np.arange(6, dtype="f4").reshape(2, 3), "e": np.zeros((0, 3), "i8")}
    save_file(arrays, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert_holds(source, arrays)
    assert {t.dtype for t in source.tensors.values()} == {"F32", "I64"}  # the plan decides


def test_snapshot_of_links_as_in_the_hugging_face_cache(model, tmp_path):
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert_holds(open_source(snapshot), tiny_tensors())


def test_shards_in_a_subdirectory(model):
    (model / "weights").mkdir()
    for shard in range(3):
        path = shard_path(model, shard)
        path.rename(model / "weights" / path.name)
    index(lambda d: {"weight_map": {n: f"weights/{f}" for n, f in d["weight_map"].items()}})(model)
    assert_holds(open_source(model), tiny_tensors())


def test_notes(model):
    save_file({"a": np.ones(2)}, model / "extra.safetensors")
    (model / "pytorch_model-00001-of-00001.bin").write_bytes(b"")
    (model / "training_args.bin").write_bytes(b"")
    total = sum(array.nbytes for array in tiny_tensors().values())
    index(lambda d: d["metadata"].update(total_size=total + 1))(model)
    source = open_source(model)
    notes = "\n".join(f"{note.subject} {note.detail}" for note in source.findings)
    assert {note.severity for note in source.findings} == {Severity.NOTE}
    for name in ("extra", "pytorch_model-00001-of-00001"):
        assert name in notes
    assert str(total) in notes and str(total + 1) in notes
    assert "training_args" not in notes
    assert_holds(source, tiny_tensors())


@pytest.mark.parametrize("metadata", [None, [], {"total_size": "5"}, {"total_size": True}])
def test_odd_index_metadata_is_no_error(model, metadata):
    index(lambda d: d.update(metadata=metadata))(model)
    assert open_source(model).findings == ()


def test_all_index_defects_come_together(model):
    index(lambda d: d["weight_map"].update(ghost=shard_path(model, 1).name))(model)
    shard_path(model, 0).unlink()
    raw = shard_path(model, 2).read_bytes()
    shard_path(model, 2).write_bytes(raw[:-5])
    with pytest.raises(SourceError) as caught:
        open_source(model)
    message = caught.value.message
    for shard in range(3):
        assert shard_path(model, shard).name in message
    assert "'ghost'" in message


@pytest.mark.parametrize("name", ["none", "model/config.json", "a\0b", "a" * 5000, "empty"])
def test_no_directory_with_tensors(model, name):
    (model.parent / "empty").mkdir()
    save_file({}, model.parent / "empty" / "model.safetensors")
    with pytest.raises(SourceError):
        open_source(model.parent / name)


def test_ranges_outside_the_tensor_are_the_callers_mistake(model):
    source = open_source(model)
    tensor = source.tensors["model.norm.weight"]
    with source.open() as reader:
        reader.read_into(tensor, tensor.nbytes, memoryview(bytearray(0)))
        for start, count in [(-1, 4), (0, tensor.nbytes + 1), (tensor.nbytes, 1)]:
            with pytest.raises(ValueError):
                reader.read_into(tensor, start, memoryview(bytearray(count)))


def embedding(model):
    source = open_source(model)
    tensor = source.tensors["model.embed_tokens.weight"]
    return source, tensor, model / tensor.file, memoryview(bytearray(tensor.nbytes))


@pytest.mark.parametrize(
    ("already_read", "spoil"),
    [
        (True, lambda path: path.write_bytes(path.read_bytes() + b"x")),
        (False, lambda path: os.utime(path, ns=(1, 1))),
        (True, lambda path: os.utime(path, ns=(1, 1))),
        (False, lambda path: os.truncate(path, 100)),
        (False, Path.unlink),
    ],
)
def test_a_changed_file_is_noticed(model, already_read, spoil):
    source, tensor, path, view = embedding(model)
    with source.open() as reader:
        if already_read:
            reader.read_into(tensor, 0, view)
        spoil(path)
        with pytest.raises(SourceError):
            reader.read_into(tensor, 0, view)


def test_io_errors_and_short_reads(model, monkeypatch):
    source, tensor, path, view = embedding(model)
    real = os.preadv
    calls = []

    def dribble(fd, buffers, offset):
        calls.append(offset)
        if len(calls) == 9:
            raise OSError(5, "Input/output error")
        return real(fd, [buffers[0][:3]], offset)

    with source.open() as reader:
        monkeypatch.setattr(files.os, "preadv", dribble)
        reader.read_into(tensor, 1, view[:20])  # seven short reads
        assert len(calls) == 7
        assert view[:20] == path.read_bytes()[tensor.offset + 1 : tensor.offset + 21]
        with pytest.raises(SourceError):
            reader.read_into(tensor, 1, view[:20])


def test_many_threads_one_reader(model):
    source, expected = open_source(model), tiny_tensors()

    def reads_right(seed):
        order = np.random.default_rng(seed).permutation(sorted(source.tensors))
        return all(
            read_all(reader, source.tensors[name], 999) == expected[name].tobytes()
            for name in order
        )

    with source.open() as reader, ThreadPoolExecutor(8) as threads:
        assert all(threads.map(reads_right, range(8)))
        assert len(reader._descriptors) == 3


def test_files_are_closed(model):
    before = open_files()
    source = open_source(model)
    with source.open() as reader:
        for tensor in source.tensors.values():
            read_all(reader, tensor)
        assert open_files() == before + 3
    assert open_files() == before


def test_opening_safetensors_imports_no_torch(model):
    code = (
        "import sys; from pathlib import Path; from phireg.source.readings import open_source\n"
        "import phireg.source.hub\n"
        "s = open_source(Path(sys.argv[1])); t = s.tensors['model.norm.weight']\n"
        "s.open().read_into(t, 0, memoryview(bytearray(t.nbytes)))\n"
        "sys.exit(bool({'torch', 'huggingface_hub', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(model)], check=False)
    assert run.returncode == 0
