"""PyTorch .bin files: the expected bytes are numpy's, of tensors that never went through a file."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.memory import measure

from phireg.errors import SourceError
from phireg.source import torchbin
from phireg.source.readings import open_source


def odd_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(60 * 70, dtype=torch.float16).reshape(60, 70)
    cube = torch.arange(5 * 6 * 7, dtype=torch.int32).reshape(5, 6, 7)
    return {
        "plain": base,
        "shared": base,
        "transposed": base.t(),
        "window": base[3:50, 7:20],
        "columns": base[:, ::3],
        "rows": base[5:9],
        "vector": base[:, 2],
        "permuted": cube.permute(2, 0, 1),
        "inner": cube[:, 1:3, ::2],
        "expanded": torch.tensor([3.5, -1.0]).expand(4, 2),
        "repeated": torch.tensor([1, 2, 3]).unsqueeze(1).expand(3, 5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3, 1)),
        "bool": torch.tensor([True, False, True]),
        "bf16": torch.randn(7, 5).bfloat16().t(),
        "ones": torch.arange(4.0).reshape(4, 1, 1)[::2],
    }


def row_major(tensor: torch.Tensor) -> bytes:
    bits = {2: torch.int16, 8: torch.int64, 4: torch.int32, 1: torch.uint8}
    return tensor.detach().contiguous().view(bits[tensor.element_size()]).numpy().tobytes()


@pytest.mark.parametrize(
    ("block", "gather"), [(1 << 30, 1 << 24), (1 << 30, 1), (1, 500), (13, 1), (256, 500)]
)
def test_every_layout_reads_row_major(tmp_path, monkeypatch, block, gather):
    monkeypatch.setattr(torchbin, "_GATHER_BYTES", gather)
    tensors = odd_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    assert set(source.tensors) == set(tensors)
    with source.open() as reader:
        for name, tensor in tensors.items():
            described = source.tensors[name]
            assert described.shape == tuple(tensor.shape)
            assert described.file == "pytorch_model.bin"
            assert described.nbytes == tensor.numel() * tensor.element_size()
            if block == 1 and described.nbytes > 500:
                continue
            data = bytearray(described.nbytes)
            for start in range(0, len(data), block):
                reader.read_into(described, start, memoryview(data)[start : start + block])
            assert bytes(data) == row_major(tensor), name


def test_dtypes(tmp_path):
    expected = {
        "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
        "I8": torch.int8, "U8": torch.uint8, "I64": torch.int64, "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip
    tensors = {code: torch.zeros(3).to(dtype) for code, dtype in expected.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    assert {t.name for t in source.tensors.values()} == set(expected)
    assert all(t.name == t.dtype for t in source.tensors.values())


def test_sharded_with_index(tmp_path):
    first, second = {"a": torch.ones(3), "b": torch.zeros(2, 2).t()}, {"c": torch.ones(4).half()}
    (tmp_path / "weights").mkdir()
    weight_map = {}
    for number, tensors in enumerate((first, second), 1):
        file = f"weights/pytorch_model-{number:05d}-of-00002.bin"
        torch.save(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 36}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = open_source(tmp_path)
    assert source.findings == ()
    assert {t.name: t.file for t in source.tensors.values()} == weight_map
    view = memoryview(bytearray(8))
    with source.open() as reader:
        reader.read_into(source.tensors["c"], 0, view)
    assert bytes(view) == np.ones(4, "f2").tobytes()


def test_digest_depends_on_the_listing_alone(tmp_path):
    def digest(tensors):
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        return open_source(tmp_path).files[0].header_digest

    first = digest({"a": torch.ones(3), "b": torch.ones(2)})
    assert digest({"b": torch.zeros(2), "a": torch.ones(3)}) == first
    assert digest({"b": torch.zeros(3), "a": torch.ones(2)}) != first
    assert digest({"a": torch.ones(3).half(), "b": torch.ones(2)}) != first


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    witness = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {witness}",)

    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "evil": Evil()}, path)
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path)
    assert not witness.exists()
    assert "running code" in caught.value.message
    assert "weights_only" not in str(caught.value)  # torch's own advice would run it
    torch.load(path, weights_only=False)  # the bait is real
    assert witness.exists()


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError):
        open_source(tmp_path)


def test_a_storage_that_is_larger_than_its_record_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(1000.0), "b": torch.arange(5000.0)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data[:100] if name.endswith("data/0") else data)
    with pytest.raises(SourceError):
        open_source(tmp_path)


MEASURE = """
import json, sys
from phireg.source.readings import open_source

open_source(Path(sys.argv[1]))  # imports what it needs
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
before = resident("VmHWM")
source = open_source(Path(sys.argv[1]))
buffer = memoryview(bytearray(16 * 2**20))
total = 0
with source.open() as reader:
    for tensor in source.tensors.values():
        for start in range(0, tensor.nbytes, len(buffer)):
            view = buffer[: min(len(buffer), tensor.nbytes - start)]
            reader.read_into(tensor, start, view)
            total += len(view)
print(json.dumps([total, resident("VmHWM") - before]))
"""


@pytest.mark.slow
def test_resident_memory_stays_small(tmp_path: Path):
    tensors = {f"w{i}": torch.full((50, 2**19), float(i), dtype=torch.float16) for i in range(6)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    total, growth = measure(MEASURE, tmp_path)
    assert total == 6 * 50 * 2**20
    assert growth < 40 * 2**20  # the 16 MiB buffer, and a few imports
