"""Headers against the safetensors library, which is the judge of what is valid and how it looks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from phireg.dtypes import ITEMSIZE
from phireg.errors import SourceError
from phireg.files.safetensors import encode_header, read_header

pytestmark = pytest.mark.hostile("headers")

NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "F16": "f2",
    "I32": "i4", "U32": "u4", "F32": "f4", "F64": "f8", "I64": "i8", "U64": "u8",
}  # fmt: skip


def write(path: Path, listing: dict, data: bytes = b"") -> Path:
    text = json.dumps(listing).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def encoded(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    header, entries = encode_header([(n, d, s) for n, (d, s, _) in tensors.items()])
    body = bytearray(header)
    for name, entry in entries.items():
        assert entry.start == len(body)
        body += tensors[name][2]
        assert entry.end == len(body)
    return bytes(body)


names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        names,
        st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=12,
    )
)
@example({'a"\\\n\x7f\x00é\u2028😀': ("F16", [3]), "b": ("U8", [3]), "a": ("U8", [0])})
def test_files_equal_the_librarys(tmp_path_factory, spec):
    arrays = {n: np.ones(shape, NUMPY[d]) for n, (d, shape) in spec.items()}
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    safetensors.numpy.save_file(arrays, path)
    expected = path.read_bytes()
    tensors = {n: (d, tuple(s), arrays[n].tobytes()) for n, (d, s) in spec.items()}
    assert encoded(tensors) == expected

    header = read_header(path)
    assert {n: (e.dtype, list(e.shape)) for n, e in header.entries.items()} == spec
    for name, entry in header.entries.items():
        assert expected[entry.start : entry.end] == arrays[name].tobytes()
        assert entry.nbytes == arrays[name].nbytes
    length = int.from_bytes(expected[:8], "little")
    assert header.digest == xxhash.xxh3_128(expected[: 8 + length]).hexdigest()
    assert header.stamp == (len(expected), path.stat().st_mtime_ns)


def test_dtypes_that_numpy_lacks_equal_torchs_file(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    dtypes = {
        "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8, "I64": torch.int64,
        "I8": torch.int8, "BOOL": torch.bool, "C64": torch.complex64,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    }  # fmt: skip
    tensors = {}
    for number, (code, dtype) in enumerate(dtypes.items()):
        raw = torch.arange(6 * ITEMSIZE[code], dtype=torch.uint8)
        raw = raw % 2 if code == "BOOL" else raw
        tensors[f"{number % 3}.{code}"] = (code, raw.view(dtype).reshape(2, 3))
    save_file({name: tensor for name, (_, tensor) in tensors.items()}, tmp_path / "x")
    described = {
        name: (code, (2, 3), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, (code, tensor) in tensors.items()
    }
    assert encoded(described) == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", "F16", (1,)), ("a", "F16", (1,))],
        [("a", "F4", (2,))],
        [("", "F16", (1,))],
        [("__metadata__", "F16", (1,))],
    ],
)
def test_encode_refuses_the_callers_mistakes(tensors):
    with pytest.raises(ValueError):
        encode_header(tensors)


def valid_file() -> bytes:
    return safetensors.numpy.save(
        {"a.b": np.ones((2, 3), "f2"), "c": np.ones(5, "u1"), "d": np.ones((), "f4")}, {"k": "v"}
    )


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.data())
def test_accepted_files_are_read_as_by_the_library(tmp_path_factory, data):
    raw = bytearray(valid_file())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        byte = data.draw(st.sampled_from(b'0123456789"{}[],:-.eF16U8 \x00\xff'))
        if kind == "set":
            raw[where] = byte
        elif kind == "insert":
            raw.insert(where, byte)
        elif kind == "delete" and len(raw) > 1:
            del raw[where]
        elif kind == "cut" and where:
            del raw[where:]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except SourceError as error:
        assert str(path) in error.message
        return
    with safetensors.safe_open(path, "numpy") as library:
        assert set(library.keys()) == set(header.entries)
        for name, entry in header.entries.items():
            assert library.get_slice(name).get_dtype() == entry.dtype
            assert tuple(library.get_slice(name).get_shape()) == entry.shape
            assert library.get_tensor(name).tobytes() == bytes(raw[entry.start : entry.end])


def test_no_tensors_at_all_is_a_valid_header(tmp_path):
    assert not read_header(write(tmp_path / "x", {})).entries


def test_a_header_length_that_spells_another_format_is_a_length(tmp_path):
    # 0x7d0280 little endian begins like a protocol 2 pickle.
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    text = text.ljust(0x7D0280)
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\x07")
    assert list(read_header(tmp_path / "x").entries) == ["a"]


@pytest.mark.parametrize("name", ["missing", "a\0b", "n" * 5000, ".", "pipe", "secret"])
def test_files_that_cannot_be_read(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_bytes(valid_file())
    (tmp_path / "secret").chmod(0)
    if name == "secret" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    with pytest.raises(SourceError):
        read_header(tmp_path / name)
