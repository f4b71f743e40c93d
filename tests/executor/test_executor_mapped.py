"""Rank files as mapped tensors: those that exceed the memory, too."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from phireg.checkpoint.mapped import MappedFile


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
    mapped = MappedFile(path)
    assert mapped.get_tensor("small").tolist() == [0, 0, 1]
    assert mapped.get_tensor("large")[-1].sum() == 0


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool],
    ids=str,
)
def test_what_safetensors_wrote(dtype, tmp_path):
    path = tmp_path / "rank0.safetensors"
    wanted = {"a": (torch.randn(3, 5) * 9).to(dtype), "b": torch.ones(1).to(dtype)[0]}
    save_file(wanted, path, {"made": "here"})
    mapped = MappedFile(path)
    assert sorted(mapped.keys()) == ["a", "b"]
    for name, tensor in wanted.items():
        got = mapped.get_tensor(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "rank0.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    MappedFile(path).get_tensor("a").add_(1)
    assert path.read_bytes() == before
    assert MappedFile(path).get_tensor("a").sum() == 0


def test_a_tensor_outlives_the_file_object(tmp_path):
    path = tmp_path / "rank0.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    tensor = MappedFile(path).get_tensor("a")
    path.unlink()
    assert tensor.sum() == 499500


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"\2\0\0\0\0\0\0\0{]"])
def test_what_is_no_safetensors_file(content, tmp_path):
    path = tmp_path / "rank0.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorError):
        MappedFile(path)


def test_a_dtype_that_torch_lacks_and_no_file(tmp_path):
    path = tmp_path / "rank0.safetensors"
    with pytest.raises(FileNotFoundError):
        MappedFile(path)
    write(path, {"a": ("F8_E8M0", [4], 4)})
    with pytest.raises(SafetensorError, match="a is F8_E8M0"):
        MappedFile(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_not_waited_for(make, tmp_path):
    path = tmp_path / "rank0.safetensors"
    make(path)
    with pytest.raises(OSError, match=r"rank0\.safetensors is not a file"):
        MappedFile(path)
