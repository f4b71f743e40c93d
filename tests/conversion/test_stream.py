"""The stream: bytes independent of blocks and workers, digests, losses, failures, memory."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from helpers.memory import measure
from helpers.plan_sources import HIDDEN, INNER, MODELS, write
from phireg_plugins.phi3_mini import FAMILY
from safetensors.numpy import load_file, save_file

import phireg
from phireg.conversion import stream as streaming
from phireg.conversion.cast import Loss
from phireg.errors import OutputError, PlanError, SourceError
from phireg.planning.model import BLOCK_BYTES
from phireg.testing import write_random_model

_, CONFIG, SHAPES = MODELS["medium"]
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "hf", CONFIG, tensors())


def run(source, out, workers=2, progress=None, **options):
    plan = phireg.plan(source, family="phi3-medium", **options)
    assert not plan.errors
    out.mkdir()
    return plan, streaming.stream(plan, out, workers=workers, progress=progress)


def files(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


# --- the same bytes --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize(("block", "workers"), [(1, 1), (100, 8), (96 * 5, 1), (1 << 20, 8)])
def test_blocks_and_workers_do_not_matter(tmp_path, source, monkeypatch, dtype, tp, block, workers):
    """Rows are 96 bytes (80 of down_proj): blocks of less than one, of one, of some, of all."""
    assert HIDDEN * 4 == 96 < BLOCK_BYTES
    _, first = run(source, tmp_path / "one", workers=2, dtype=dtype, tp_size=tp)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", block)
    plan, second = run(source, tmp_path / "two", workers=workers, dtype=dtype, tp_size=tp)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "two")) == {f"rank{rank}.safetensors" for rank in range(tp)}
    assert first.digests == second.digests
    assert first.losses == second.losses == {}
    assert plan.bytes_out == sum(map(len, files(tmp_path / "two").values()))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_digests_are_those_of_the_bytes_in_the_files(tmp_path, source, monkeypatch, tp):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 200)
    plan, streamed = run(source, tmp_path / "out", dtype="float32", tp_size=tp)
    digests = {}
    for rank in range(tp):
        stored = load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        digests |= {
            (rank, name): xxhash.xxh3_128_hexdigest(tensor.tobytes())
            for name, tensor in stored.items()
        }
    assert streamed.digests == digests
    assert len(digests) == len(plan.outputs)


def test_progress_counts_every_byte_of_data(tmp_path, source):
    counts = []
    plan, _ = run(source, tmp_path / "out", progress=counts.append, tp_size=4, dtype="float32")
    assert sum(counts) == plan.bytes_out - sum(map(len, plan.headers))
    assert min(counts) > 0


def test_bits_that_are_not_numbers_are_kept(tmp_path):
    """NaN payloads, -0, infinities, subnormals: a conversion without a cast moves bytes."""
    stored = tensors()
    odd = [0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x7F800000, 0xFF800000, 0x1, 0x80000001]
    for tensor in stored.values():
        tensor.reshape(-1)[: len(odd)] = np.array(odd, np.uint32).view(np.float32)
    _, streamed = run(write(tmp_path / "hf", CONFIG, stored), tmp_path / "out", dtype="float32")
    out = load_file(tmp_path / "out" / "rank0.safetensors")
    assert out["transformer.ln_f.weight"].view(np.uint32)[:8].tolist() == odd
    assert out["lm_head.weight"].tobytes() == stored[HEAD].tobytes()
    assert streamed.losses == dict.fromkeys(stored, Loss(nan=3, infinite=2))


# --- what a cast loses -----------------------------------------------------------------------


@pytest.fixture
def lossy(tmp_path):
    """Values float16 cannot hold, in tensors that go to one rank, to all, or in columns."""
    stored = tensors()
    stored[NORM][[0, 5]] = [1e6, -1e6]
    stored[NORM][7] = np.inf
    stored[HEAD][3, 3] = 70000.0
    stored[HEAD][5, [0, 23]] = [np.nan, -np.nan]
    stored[HEAD][36, 23] = 1e-9
    down = stored["model.layers.1.mlp.down_proj.weight"]
    down[0, [0, 19]], down[23, 10] = 1e-10, -1e-10
    stored["model.layers.0.mlp.gate_up_proj.weight"][0, :3] = [0.0, -0.0, 1e-7]  # rounds, not to 0
    return write(tmp_path / "hf", CONFIG, stored)


LOST = {
    NORM: Loss(overflowed=2, flushed=0, infinite=1),
    HEAD: Loss(overflowed=1, flushed=1, nan=2),
    "model.layers.1.mlp.down_proj.weight": Loss(overflowed=0, flushed=3),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_losses_are_counted_once_per_source_value(tmp_path, lossy, monkeypatch, tp, block):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", block)
    _, streamed = run(lossy, tmp_path / "out", dtype="float16", tp_size=tp)
    assert streamed.losses == LOST


def test_overflow_is_refused_with_names_and_counts(tmp_path, lossy):
    with pytest.raises(PlanError) as caught:
        phireg.convert(phireg.plan(lossy, dtype="float16", tp_size=2), tmp_path / "out")
    text = str(caught.value)
    assert f"{NORM}: 2 values" in text and f"{HEAD}: 1 value" in text
    assert "down_proj" not in text  # what became zero is reported, not refused
    assert "--allow-overflow" in text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    done = phireg.convert(phireg.plan(lossy, dtype="bfloat16"), tmp_path / "out")
    assert done.losses == {NORM: Loss(infinite=1), HEAD: Loss(nan=2)}


def test_overflow_that_is_allowed_is_written_and_reported(tmp_path, lossy):
    done = phireg.convert(
        phireg.plan(lossy, dtype="float16"), tmp_path / "out", allow_overflow=True
    )
    assert done.losses == LOST
    out = load_file(tmp_path / "out" / "rank0.safetensors")
    assert out["transformer.ln_f.weight"][[0, 5, 7]].tolist() == [np.inf, -np.inf, np.inf]
    assert out["lm_head.weight"][36, 23] == 0
    assert out["transformer.layers.1.mlp.proj.weight"][23, 10] == 0
    assert np.signbit(out["transformer.layers.1.mlp.proj.weight"][23, 10])
    assert out["transformer.layers.0.mlp.fc.weight"][INNER, :3].view(np.uint16).tolist() == [
        *(0, 0x8000, 2)
    ]


# --- a source that does not hold still -------------------------------------------------------


class Once:
    """Does something to the source when the first bytes have been written."""

    def __init__(self, action):
        self.action = action
        self.lock = threading.Lock()

    def __call__(self, *_):
        with self.lock:
            action, self.action = self.action, None
        if action:
            action()


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def append(path):
    with path.open("ab") as file:
        file.write(b"x")


def overwrite(path):
    """The same size, and one byte inside a tensor is another."""
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [truncate, append, overwrite])
def test_a_source_that_changes_leaves_no_output(tmp_path, source, monkeypatch, change):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1)
    plan, path = phireg.plan(source), source / "model.safetensors"
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        phireg.convert(plan, tmp_path / "out", progress=Once(lambda: change(path)))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_shard_replaced_or_removed_after_planning_is_noticed(tmp_path, source):
    plan = phireg.plan(source)
    save_file(tensors(seed=1), source / "other")
    (source / "other").replace(source / "model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match="changed"):
        streaming.stream(plan, tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(SourceError):
        phireg.convert(plan, tmp_path / "converted")


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_stops_all_workers_and_is_the_one_reported(tmp_path, source, monkeypatch, workers):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1)
    written, lock, threads = [], threading.Lock(), threading.active_count()

    def progress(count):
        with lock:
            written.append(count)
            if len(written) == 10:
                raise RuntimeError("tenth block")
            late = len(written) > 10
        if late:
            time.sleep(0.02)  # the others stop at their next block

    with pytest.raises(RuntimeError, match="tenth block"):
        run(source, tmp_path / "out", workers, progress, dtype="float32")
    assert threading.active_count() == threads
    assert len(written) < 60  # of several hundred


def test_rank_files_are_never_overwritten(tmp_path, source):
    plan = phireg.plan(source)
    (tmp_path / "rank0.safetensors").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        streaming.stream(plan, tmp_path)
    assert (tmp_path / "rank0.safetensors").read_bytes() == b"somebody's"


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, source, monkeypatch):
    """The system reports it once: to the sync in the background, and not to the one at the end."""
    synced, sync = [], os.fsync

    def fail(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name == "rank1.safetensors" and name not in synced:
            synced.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(streaming, "SYNC_BYTES", 1000)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError):
        phireg.convert(phireg.plan(source, tp_size=2), tmp_path / "out")
    assert len(synced) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    monkeypatch.setattr(os, "fsync", sync)
    phireg.convert(phireg.plan(source, tp_size=2), tmp_path / "out")
    run(source, tmp_path / "whole", tp_size=2)
    ranks = {name: data for name, data in files(tmp_path / "out").items() if "rank" in name}
    assert ranks == files(tmp_path / "whole")


def test_a_cast_needs_no_torch(tmp_path, source):
    program = """
import sys
sys.modules["torch"] = None
import phireg
phireg.convert(phireg.plan(sys.argv[1], dtype="float16", tp_size=2), sys.argv[2])
"""
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    subprocess.run(command, check=True)
    assert len(list((tmp_path / "out").glob("rank*"))) == 2


# --- memory ----------------------------------------------------------------------------------

CONVERT = """
import json, sys
import phireg
from phireg.conversion.stream import workers_of

source, dtype, tp = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
plan = phireg.plan(source, dtype=dtype, tp_size=tp)
before = resident("VmRSS")
phireg.convert(plan, source.parent / "out")
peak = resident("VmHWM")
print(json.dumps([plan.bytes_in, before, peak, plan.buffer_bytes(workers_of(plan))]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    config = {
        **CONFIG,
        **{"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32},
        **{"num_key_value_heads": 32, "vocab_size": 10016, "torch_dtype": "bfloat16"},
        "num_hidden_layers": 2,
    }
    directory = tmp_path_factory.mktemp("large") / "hf"
    write_random_model(FAMILY, config, directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tp", [("bfloat16", 4), ("float16", 2)])
def test_memory_does_not_grow_with_the_model(large, tmp_path, dtype, tp):
    (tmp_path / "hf").symlink_to(large)
    size, before, peak, promised = measure(CONVERT, tmp_path / "hf", dtype, tp)
    assert size > 550_000_000
    assert promised <= 50_000_000
    assert peak - before < promised + 24_000_000  # threads, their stacks, allocator slack
