"""The file of calibration statistics: what comes back, and damage."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from phireg.calibration.statistics import Statistics, load, save
from phireg.errors import OutputError, SourceError

FORMAT = {"format": "phireg-calibration-1", "provenance": "{}"}


def made():
    inputs = {
        "model.layers.10.mlp.fc1": np.array([0.0, 2.5, 1e-40, 3e38], dtype=np.float32),
        "model.layers.2.mlp.fc1": np.array([7.0], dtype=np.float32),
    }
    return Statistics(inputs, (1.5, 0.0), (2.25, 1e-3), {"samples": 3, "why": "é\n"})


def test_the_file(tmp_path):
    path = tmp_path / "below" / "amax.safetensors"
    save(path, made())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(str(path), framework="pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "model.layers.10.mlp.fc1.input_amax": torch.tensor([0, 2.5, 1e-40, 3e38]).tolist(),
            "model.layers.2.mlp.fc1.input_amax": [7.0],
            "layers.0.key_amax": [1.5], "layers.1.key_amax": [0.0],
            "layers.0.value_amax": [2.25],
            "layers.1.value_amax": torch.tensor([1e-3]).tolist(),
        }  # fmt: skip
        assert json.loads(file.metadata()["provenance"]) == {"samples": 3, "why": "é\n"}


def test_what_comes_back(tmp_path):
    path = tmp_path / "amax"
    save(path, made())
    read, wanted = load(path), made()
    assert {n: a.tolist() for n, a in read.inputs.items()} == {
        n: a.tolist() for n, a in wanted.inputs.items()
    }
    assert all(a.dtype == np.float32 for a in read.inputs.values())
    assert (read.keys, read.provenance) == (wanted.keys, wanted.provenance)
    assert read.values == (2.25, float(np.float32(1e-3)))


def test_a_new_file_replaces_the_old_one_only_when_complete(tmp_path):
    path = tmp_path / "amax"
    save(path, made())
    before = path.read_bytes()

    class FullError(Exception):
        pass

    def full(fd):
        raise FullError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FullError):
        patch.setattr(os, "fsync", full)
        save(path, Statistics(made().inputs, (), (), {}))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["amax"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save(tmp_path / "file" / "amax", made())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_maxima_that_are_none(bad):
    inputs = {"a.b": np.array([1, bad, 2], dtype=np.float32)}
    with pytest.raises(SourceError, match=r"input of a\.b .*channel 1"):
        Statistics(inputs, (), (), {})
    good = {"a.b": np.ones(2, dtype=np.float32)}
    with pytest.raises(SourceError, match="keys of layer 1"):
        Statistics(good, (1.0, bad), (1.0, 1.0), {})
    with pytest.raises(SourceError, match="values of layer 0"):
        Statistics(good, (1.0,), (bad,), {})


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a.input_amax": [1.0, -2.0]}, FORMAT, "input of a has the maximum -2"),
        ({"a.input_amax": [np.nan]}, FORMAT, "input of a has the maximum nan"),
        ({"a.input_amax": [[1.0]]}, FORMAT, "one float32 per channel"),
        ({"a.input_amax": []}, FORMAT, "one float32 per channel"),
        ({"a.output_amax": [1.0]}, FORMAT, "unknown tensor a.output_amax"),
        ({"layers.0.key_amax": [1.0], "layers.0.value_amax": [1.0]}, FORMAT, "no linear"),
        ({"a.input_amax": [1.0], "layers.0.key_amax": [1.0]}, FORMAT, "keys of 1 layers"),
        (
            {"a.input_amax": [1.0], "layers.1.key_amax": [1.0], "layers.1.value_amax": [1.0]},
            FORMAT, "layers.0.key_amax is missing",
        ),
        ({"a.input_amax": [1.0], "layers.0.key_amax": [1.0, 2.0]}, FORMAT, r"not float32 \[1\]"),
        ({"a.input_amax": [1.0]}, None, "no calibration statistics"),
        ({"a.input_amax": [1.0]}, {**FORMAT, "format": "other"}, "no calibration statistics"),
        ({"a.input_amax": [1.0]}, {"format": FORMAT["format"]}, "provenance is not JSON"),
        ({"a.input_amax": [1.0]}, {**FORMAT, "provenance": "[]"}, "not an object"),
    ],
)  # fmt: skip
def test_damaged_contents(tmp_path, tensors, metadata, message):
    path = tmp_path / "amax.safetensors"
    arrays = {name: np.array(value, dtype=np.float32) for name, value in tensors.items()}
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(SourceError, match=message) as caught:
        load(path)
    assert str(path) in caught.value.message


def test_other_dtypes(tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        save_torch({"a.input_amax": torch.ones(2, dtype=dtype)}, tmp_path / "x", metadata=FORMAT)
        with pytest.raises(SourceError, match="x"):
            load(tmp_path / "x")


def test_other_safetensors_files(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    for dtype in (torch.float32, torch.bfloat16):  # numpy has no bfloat16
        save_file({"x": torch.ones(2, dtype=dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(SourceError, match="holds no calibration statistics"):
            load(tmp_path / "model.safetensors")


def test_damaged_files(tmp_path):
    path = tmp_path / "amax"
    save(path, made())
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match="not a readable safetensors file"):
            load(path)
    with pytest.raises(SourceError, match="no such file"):
        load(tmp_path / "nothing")
    with pytest.raises(SourceError, match="not a readable"):
        load(tmp_path)
