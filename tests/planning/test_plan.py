"""A plan against its execution: bytes, ranges, memory."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from helpers.plan_sources import MODELS, addresses, write

import phireg
from phireg import registry
from phireg.conversion import stream
from phireg.planning import model
from phireg.planning.report import as_json
from phireg.testing import write_random_model


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_each_mapped_byte_is_read_once(tmp_path, name, tp):
    family, config, shapes = MODELS[name]
    tensors = addresses(shapes)
    for i in range(3):  # dropped, so not read
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.uint32)
    source = write(tmp_path / "hf", config, tensors)
    plan = phireg.plan(source, family=family, tp_size=tp, dtype="float32")
    assert not plan.errors
    assert plan.bytes_in == sum(4 * math.prod(shape) for shape in shapes.values())
    reads = {name: np.zeros(shape[0], int) for name, shape in shapes.items()}
    for task in plan.tasks:
        for step in task.steps:
            if step.source is not None:
                reads[step.source.name][step.row : step.row + step.count] += 1
    assert all((count == 1).all() for count in reads.values())
    assert plan.casts == 0
    phireg.convert(plan, tmp_path / "out")
    written = [(tmp_path / "out" / f"rank{r}.safetensors").stat().st_size for r in range(tp)]
    assert list(plan.file_sizes) == written
    assert plan.bytes_out == sum(written)
    check_ranges(plan, source, tmp_path / "out", tensors, tp)


def check_ranges(plan, source, output, tensors, tp):
    """Source elements hold their own address, so the written files tell where they are from."""
    stored = (source / "model.safetensors").read_bytes()
    report = json.loads(json.dumps(as_json(plan, workers=2)))
    assert report["tp_size"] == tp and report["bytes_in"] == plan.bytes_in
    assert {entry["file"] for entry in report["outputs"]} == {
        f"rank{rank}.safetensors" for rank in range(tp)
    }
    for entry in report["outputs"]:
        count = math.prod(entry["shape"])
        assert (entry["dtype"], entry["bytes"]) == ("F32", 4 * count)
        elements = np.fromfile(
            output / entry["file"], np.uint32, count, offset=entry["offset"]
        ).reshape(entry["shape"])
        position = 0
        for piece in entry["rows"]:
            start, stop = piece["rows"]
            assert start == position < stop
            position = stop
            if piece["from"] is None:
                assert not elements[start:stop].any()
                continue
            origin = piece["from"]
            assert origin["file"] == "model.safetensors"
            rows = tensors[origin["tensor"]][slice(*origin["rows"])]
            assert rows.tobytes() == stored[slice(*origin["bytes"])]
            if rows.ndim == 2:
                rows = np.concatenate([rows[:, a:b] for a, b in origin["columns"]], axis=1)
            else:
                assert origin["columns"] == []
            assert np.array_equal(elements[start:stop], rows)
        assert position == entry["shape"][0]


def test_explain_finds_tensors_modules_and_near_names(tmp_path):
    family, config, shapes = MODELS["small"]
    source = write(tmp_path / "hf", config, addresses(shapes))
    plan = phireg.plan(source, family=family, tp_size=2)
    module = "transformer.layers.1.attention.qkv"
    assert {(o.rank, o.name) for o in phireg.explain(plan, module)} == {
        (rank, f"{module}.{kind}") for rank in (0, 1) for kind in ("weight", "bias")
    }
    assert len(phireg.explain(plan, f"{module}.bias")) == 2
    with pytest.raises(phireg.PhiregError, match=r"attention\.qkv"):
        phireg.explain(plan, "transformer.layers.1.attention.kqv")


@pytest.mark.parametrize(("block", "workers"), [(512, 2), (1 << 20, 1)])
@pytest.mark.parametrize("name", ["mini", "small"])
def test_buffers_stay_under_the_bound(tmp_path, monkeypatch, name, block, workers):
    family, config, _ = MODELS[name]
    hidden = 4096  # rows of 8 KiB, longer than the smaller block
    wide = {"hidden_size": hidden, "intermediate_size": 512, "ff_intermediate_size": 512}
    config = {**config, **wide, "num_hidden_layers": 1, "num_attention_heads": 16}
    config["num_key_value_heads"] = 2
    source = tmp_path / "hf"
    write_random_model(registry.load(family).family, config, source)
    monkeypatch.setattr(model, "BLOCK_BYTES", block)
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    plan = phireg.plan(source, family=family, tp_size=2, dtype="bfloat16")
    assert not plan.errors
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    stream.stream(plan, tmp_path / "out", workers=workers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    bookkeeping = 300_000
    assert peak < plan.buffer_bytes(workers) + bookkeeping < plan.bytes_in / 8
