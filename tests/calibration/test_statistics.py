"""The file of calibration statistics: what comes back, and damage."""

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


def example():
    inputs = {
        "model.layers.10.mlp.fc1": np.array([0.0, 2.5, 1e-40, 3e38], dtype=np.float32),
        "model.layers.2.mlp.fc1": np.array([7.0], dtype=np.float32),
    }
    factors = {"model.layers.2.mlp.fc1": np.array([0.125], dtype=np.float32)}
    return Statistics(inputs, (1.5, 0.0), (2.25, 1e-3), {"samples": 3, "why": "é\n"}, factors)


def test_the_file(tmp_path):
    path = tmp_path / "below" / "amax.safetensors"
    save(path, example())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(str(path), framework="pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "model.layers.10.mlp.fc1.input_amax": torch.tensor([0, 2.5, 1e-40, 3e38]).tolist(),
            "model.layers.2.mlp.fc1.input_amax": [7.0],
            "model.layers.2.mlp.fc1.awq_factor": [0.125],
            "layers.0.key_amax": [1.5], "layers.1.key_amax": [0.0],
            "layers.0.value_amax": [2.25],
            "layers.1.value_amax": torch.tensor([1e-3]).tolist(),
        }  # fmt: skip
    loaded, expected = load(path), example()
    assert {n: a.tolist() for n, a in loaded.inputs.items()} == {
        n: a.tolist() for n, a in expected.inputs.items()
    }
    assert all(a.dtype == np.float32 for a in loaded.inputs.values())
    assert (loaded.keys, loaded.provenance) == (expected.keys, expected.provenance)
    assert {name: x.tolist() for name, x in loaded.awq.items()} == {
        name: x.tolist() for name, x in expected.awq.items()
    }
    assert loaded.values == (2.25, float(np.float32(1e-3)))


def test_a_new_file_replaces_the_old_one_only_when_complete(tmp_path):
    path = tmp_path / "amax"
    save(path, example())
    before = path.read_bytes()

    class FullError(Exception):
        pass

    def full(fd):
        raise FullError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FullError):
        patch.setattr(os, "fsync", full)
        save(path, Statistics(example().inputs, (), (), {}))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["amax"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save(tmp_path / "file" / "amax", example())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_maxima_that_are_none(bad):
    inputs = {"a.b": np.array([1, bad, 2], dtype=np.float32)}
    with pytest.raises(SourceError, match=r"input of a\.b .*channel 1"):
        Statistics(inputs, (), (), {})
    inputs = {"a.b": np.ones(2, dtype=np.float32)}
    with pytest.raises(SourceError, match="keys of layer 1"):
        Statistics(inputs, (1.0, bad), (1.0, 1.0), {})
    with pytest.raises(SourceError, match="values of layer 0"):
        Statistics(inputs, (1.0,), (bad,), {})


@pytest.mark.parametrize(
    ("tensors", "metadata", "name"),
    [
        ({"a.input_amax": [1.0, -2.0]}, FORMAT, "of a "),
        ({"a.input_amax": [np.nan]}, FORMAT, "of a "),
        ({"a.input_amax": [[1.0]]}, FORMAT, "of a "),
        ({"a.input_amax": []}, FORMAT, "of a "),
        ({"a.output_amax": [1.0]}, FORMAT, "a.output_amax"),
        ({"a.input_amax": [1.0], "a.awq_factor": [0.0]}, FORMAT, "factors of a "),
        ({"a.input_amax": [1.0], "b.awq_factor": [1.0]}, FORMAT, "AWQ's b"),
        ({"a.input_amax": [1.0], "a.awq_factor": [1.0, 1.0]}, FORMAT, "AWQ's a"),
        ({"layers.0.key_amax": [1.0], "layers.0.value_amax": [1.0]}, FORMAT, "linear"),
        ({"a.input_amax": [1.0], "layers.0.key_amax": [1.0]}, FORMAT, "keys"),
        (
            {"a.input_amax": [1.0], "layers.1.key_amax": [1.0], "layers.1.value_amax": [1.0]},
            FORMAT, "layers.0.key_amax",
        ),
        ({"a.input_amax": [1.0], "layers.0.key_amax": [1.0, 2.0]}, FORMAT, "layers.0.key_amax"),
        ({"a.input_amax": [1.0]}, None, FORMAT["format"]),
        ({"a.input_amax": [1.0]}, {**FORMAT, "format": "other"}, FORMAT["format"]),
        ({"a.input_amax": [1.0]}, {"format": FORMAT["format"]}, "JSON"),
        ({"a.input_amax": [1.0]}, {**FORMAT, "provenance": "[]"}, "object"),
    ],
)  # fmt: skip
def test_damaged_contents(tmp_path, tensors, metadata, name):
    path = tmp_path / "amax.safetensors"
    arrays = {name: np.array(value, dtype=np.float32) for name, value in tensors.items()}
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(SourceError, match=name) as caught:
        load(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    save_torch({"a.input_amax": torch.ones(2, dtype=dtype)}, tmp_path / "x", metadata=FORMAT)
    with pytest.raises(SourceError, match="x"):
        load(tmp_path / "x")


def test_damaged_files(tmp_path):
    path = tmp_path / "amax"
    save(path, example())
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=str(path)) as caught:
            load(path)
        assert "make" in caught.value.hint  # nobody can download it
    for other in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SourceError, match=str(other)):
            load(other)
