"""PyTorch's .bin files: what is pickled is bounded, and so is what a view of a storage needs."""

import io
import os
import pickletools
import zipfile

import pytest
import torch
import torch._subclasses.fake_tensor  # which takes longer than any file here
from helpers.bounds import bounded
from helpers.hostile_readers import archive
from helpers.tiny_phi3 import tiny_tensors

from phireg.errors import SourceError
from phireg.source.model import FORMATS
from phireg.source.pickles import check_pickle
from phireg.source.torchbin import list_bin

pytestmark = pytest.mark.hostile("PyTorch archives")

NAME = "pytorch_model.bin"
PROTO, STOP = b"\x80\x02", b"."


def call(name, argument):
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n" + argument + b"\x85R"


def integer(value):
    data = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data


def in_a_dict(pickled):
    return PROTO + b"}X\x01\x00\x00\x00a" + pickled + b"s" + STOP


def nested_key(depth):
    """A dict whose key is a tuple of two tuples of two tuples..., each pair the same object."""
    key = b"K\x01"
    for number in range(depth):
        key += b"q" + bytes([number]) + b"h" + bytes([number]) + b"\x86"
    return PROTO + b"}" + key + b"K\x01s" + STOP


PICKLES = {
    "bytearray": in_a_dict(call("builtins.bytearray", integer(10**13))),
    "legacy-tensor": in_a_dict(call("torch.FloatTensor", integer(10**13))),
    "tensor": in_a_dict(call("torch.Tensor", integer(10**13))),
    "set": in_a_dict(call("builtins.set", b"]")),
    "system": in_a_dict(call("os.system", b"X\x02\x00\x00\x00id")),
    "exponential-key": nested_key(60),
    "unicode-of-4-GB": PROTO + b"X\xff\xff\xff\xffa" + STOP,
    "no-stop": PROTO + b"}",
    "stack-underflow": PROTO + b"sss" + STOP,
    "marks": PROTO + b"(" * 100_000 + STOP,
    "lists-in-lists": PROTO + b"]" * 100_000 + b"a" * 99_999 + STOP,
    "digits": PROTO + b"I" + b"9" * 5000 + b"\n" + STOP,
    "four-MiB": PROTO + b"N0" * 2**21 + b"}" + STOP,
    "empty": b"\x80",
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_pickles(content, tmp_path):
    (tmp_path / NAME).write_bytes(archive(content, b""))
    with bounded(20), pytest.raises(SourceError, match=NAME):
        list_bin(tmp_path, NAME)


def test_a_large_memo_number_takes_no_memory(tmp_path):
    (tmp_path / NAME).write_bytes(archive(PROTO + b"}r\xff\xff\xff\x7f" + STOP, b""))
    with bounded(20):
        assert list_bin(tmp_path, NAME).tensors == ()


def test_what_torch_writes_is_taken():
    """Shared storages, views, parameters, tied names; and a model of many tensors."""
    tensors = {name: torch.from_numpy(value) for name, value in tiny_tensors().items()}
    tensors |= {"tied": tensors["lm_head.weight"], "view": tensors["lm_head.weight"][:, 3:].T}
    tensors |= {"parameter": torch.nn.Parameter(torch.ones(2)), "scalar": torch.tensor(1.0)}
    tensors |= {f"more.{number}": torch.ones(1) for number in range(10_000)}
    for options in ({}, {"pickle_protocol": 3}):
        out = io.BytesIO()
        torch.save(tensors, out, **options)
        with zipfile.ZipFile(out) as file:
            raw = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
        with bounded(30):
            check_pickle(raw)
        assert any(opcode.name == "GLOBAL" for opcode, _, _ in pickletools.genops(raw))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 2), (1, 2**35)),  # two bytes here, two bytes 32 GiB further on
        ((2**18, 2), (1, 2**34)),
        ((2**20, 2**20), (0, 0)),  # a terabyte that is one element
        ((2**20, 2**12), (1, 0)),
        ((3, 2, 2), (2**30, 1, 2**35)),
    ],
)
def test_views_of_sparse_storages(shape, strides, tmp_path):
    base = torch.zeros(1, dtype=torch.float16)
    torch.save({"a": torch.zeros(4, dtype=torch.float16)}, tmp_path / NAME)
    with torch.serialization.skip_data():
        view = torch.empty(2**37, dtype=torch.float16, device="meta").as_strided(shape, strides)
        assert view.shape == torch.Size(shape) and base.numel() == 1
    # A file with a hole of 256 GiB, which takes no room on the disk.
    write_with_hole(tmp_path / NAME, view, 2**38)
    with bounded(20), pytest.raises(SourceError, match="'a'"):
        FORMATS[".bin"](tmp_path, NAME)


def write_with_hole(path, view, size):
    """What torch.save writes of one view, with a storage of ``size`` bytes that is a hole."""
    small = io.BytesIO()
    torch.save({"a": torch.zeros(4, dtype=torch.float16)}, small)
    with zipfile.ZipFile(small) as file:
        name = next(name for name in file.namelist() if name.endswith("data.pkl"))
        raw = file.read(name)
    numbers = [*view.shape, *view.stride()]
    raw = raw.replace(b"K\x04", b"\x8a\x09" + (size // 2).to_bytes(9, "little"), 1)
    shape = b"(" + b"".join(map(integer, view.shape)) + b"t"
    strides = b"(" + b"".join(map(integer, view.stride())) + b"t"
    assert len(numbers) == 2 * view.dim()
    # The size (4,) and the strides (1,) of the small tensor.
    raw = raw.replace(b"K\x04\x85", shape, 1).replace(b"K\x01\x85", strides, 1)
    with zipfile.ZipFile(path, "w", allowZip64=True) as file:
        file.writestr("archive/data.pkl", raw)
        file.writestr("archive/version", "3\n")
        info = zipfile.ZipInfo("archive/data/0")
        info.file_size = info.compress_size = size
        with file.open(info, "w", force_zip64=True) as out:
            handle = file.fp
            out._file_size = out._compress_size = size
            os.truncate(path, handle.tell())
            handle.seek(size, os.SEEK_CUR)
