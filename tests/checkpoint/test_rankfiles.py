"""Rank files in torch and numpy: those that exceed the memory, too."""

import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from phireg.checkpoint.rankfiles import RankFile, RankFiles
from phireg.errors import SourceError


def write(path, tensors):
    """A sparse file of zeros with the header of these (dtype, shape, bytes)."""
    header, end = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + end)


def test_a_file_larger_than_memory_and_swap(tmp_path):
    with Path("/proc/meminfo").open() as file:
        sizes = {key: value.split()[0] for key, value in (line.split(":") for line in file)}
    large = 2 * 1024 * (int(sizes["MemTotal"]) + int(sizes["SwapTotal"])) // 4096 * 4096
    path = tmp_path / "rank0.safetensors"
    write(path, {"large": ("BF16", [large // 4096, 2048], large), "small": ("F32", [3], 12)})
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80\x3f")
    with RankFile(path) as file:
        tensor = file.mapped()
        assert file.read("large", large // 2 - 3).tolist() == [0, 0, 0]
    assert tensor("small").tolist() == [0, 0, 1]
    assert tensor("large")[-1].sum() == 0


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool],
    ids=str,
)
def test_what_safetensors_wrote(dtype, tmp_path):
    tensors = {"m.a": (torch.randn(3, 5) * 9).to(dtype), "m.b": torch.ones(1).to(dtype)[0]}
    save_file(tensors, tmp_path / "rank1.safetensors", {"made": "here"})
    with RankFiles(tmp_path, [1]) as files:
        mapped = files[1].mapped()
        assert list(files) == [1] and not files.errors
        assert files.kinds()[0].keys() == tensors.keys()
        assert files[1].module("m").keys() == {"a", "b"}
        for name, tensor in tensors.items():
            same = mapped(name)
            assert (same.dtype, same.shape) == (tensor.dtype, tensor.shape)
            raw = tensor.reshape(-1).view(torch.uint8).numpy()
            assert (same.reshape(-1).view(torch.uint8).numpy() == raw).all()
            assert (files[1].read(name).view("u1") == raw).all()
            assert files[1].digest(name) == xxhash.xxh3_128_hexdigest(raw.tobytes())
            assert files.kind(1, name)[1] == tuple(tensor.shape)
        assert (files[1].read("m.a", 4, 2) == files[1].read("m.a")[4:6]).all()


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "rank0.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    RankFile(path).mapped()("a").add_(1)
    assert path.read_bytes() == before
    assert RankFile(path).mapped()("a").sum() == 0


def test_a_tensor_outlives_the_file_object(tmp_path):
    path = tmp_path / "rank0.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    with RankFile(path) as file:
        tensor = file.mapped()("a")
    path.unlink()
    assert tensor.sum() == 499500


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "rank0.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    with RankFile(path) as file:
        os.utime(path, ns=(0, 0))
        with pytest.raises(SourceError):
            file.read("a")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"\2\0\0\0\0\0\0\0{]"])
def test_what_is_no_safetensors_file(content, tmp_path):
    (tmp_path / "rank0.safetensors").write_bytes(content)
    with RankFiles(tmp_path, 2) as files:
        assert files.errors.keys() == {0, 1}
        assert files.kinds() == [{}, {}]
        assert files.kind(0, "a") is None


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_not_waited_for(make, tmp_path):
    path = tmp_path / "rank0.safetensors"
    make(path)
    with pytest.raises(SourceError, match=r"rank0\.safetensors"):
        RankFile(path)
