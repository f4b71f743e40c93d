"""A whole calibration: its samples and record, and the reuse of its statistics."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers import tiny_models as sources
from safetensors.torch import load_file, save_file

import phireg
from phireg import registry
from phireg.calibration import calibrate as calibration
from phireg.calibration.calibrate import describe, misfit, run_calibration
from phireg.calibration.collect import Cost, collect
from phireg.calibration.settings import Settings
from phireg.calibration.statistics import load, save
from phireg.device import within_memory
from phireg.errors import SourceError, UsageError
from phireg.reference.load import open_reference
from phireg.source.readings import open_source

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
IDS = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]


def family(name):
    return registry.load(sources.MODELS[name][1]).family


@pytest.fixture
def calibrated(tmp_path):
    """A source, settings with a file of ids, and their statistics."""
    source = open_source(sources.write("phi2", tmp_path / "source", torch.bfloat16))
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in IDS))
    settings = Settings(file=path, device="cpu")
    return source, settings, run_calibration(family("phi2"), source, settings)


def test_maxima_are_those_of_the_rows(calibrated):
    source, _, statistics = calibrated
    reference = open_reference(
        family("phi2"), source.directory, weights=None, dtype=torch.bfloat16, device=CPU
    )
    expected = collect(reference, IDS, device=CPU)
    assert statistics.inputs.keys() == expected.inputs.keys()
    assert all((statistics.inputs[n] == expected.inputs[n]).all() for n in expected.inputs)
    assert (statistics.keys, statistics.values) == (expected.keys, expected.values)


def test_provenance_and_progress(calibrated, tmp_path):
    source, settings, statistics = calibrated
    provenance = statistics.provenance
    assert provenance["family"] == "phi2"
    assert provenance["source"] == {"model.safetensors": source.files[0].header_digest}
    assert (provenance["samples"], provenance["tokens"], provenance["longest"]) == (3, 9, 4)
    assert (provenance["dtype"], provenance["device"]) == ("bfloat16", "cpu")
    assert provenance["data"] == str(settings.file)
    assert provenance["settings"]["size"] is None
    assert provenance["versions"]["torch"] == metadata.version("torch")
    save(tmp_path / "amax", statistics)
    assert load(tmp_path / "amax").provenance == provenance
    lines, steps = [], []
    run_calibration(
        family("phi2"), source, settings,
        progress=lambda more, total: steps.append(more), tell=lines.append,
    )  # fmt: skip
    assert lines[0].endswith(describe(provenance)) and len(lines) == 2
    assert sum(steps) == 27


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_gpu_that_is_too_small_is_named(kind):
    """CUDA reports a full memory in two ways."""
    gpu, refused = torch.device("cuda"), pytest.raises(UsageError, match="memory of cuda")
    with refused as caught, within_memory(gpu, "less."):
        raise kind("CUDA error: out of memory")
    assert caught.value.hint == "less."
    for device, text in (("cuda", "misaligned address"), ("cpu", "out of memory")):
        with pytest.raises(kind), within_memory(torch.device(device), "less."):
            raise kind(text)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")],
)
def test_a_cpu_never_computes_in_float16(tmp_path, stored, computed):
    source = open_source(sources.write("phi2", tmp_path, getattr(torch, stored)))
    assert str(calibration._compute_dtype(source, CPU)) == f"torch.{computed}"
    assert str(calibration._compute_dtype(source, torch.device("cuda"))) == f"torch.{stored}"


@pytest.mark.parametrize(
    ("seconds_per_token", "size", "samples", "text"),
    [
        (1e-3, None, 30, "0 s"),
        (2.0, None, 15, "15 more samples"),
        (20.0, None, 8, "27 minutes"),
        (20.0, 30, 30, "100 minutes"),
    ],
)
def test_the_default_size_ends_in_reasonable_time(
    tmp_path, monkeypatch, seconds_per_token, size, samples, text
):
    """Rows of 10 tokens; 300 seconds and 8 samples are granted."""
    source = open_source(sources.write("phi2", tmp_path / "source"))
    path = tmp_path / "ids.jsonl"
    path.write_text((json.dumps({"input_ids": list(range(10))}) + "\n") * 30)
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: Cost(0.0, seconds_per_token))
    lines = []
    settings = Settings(file=path, size=size, device="cpu")
    statistics = run_calibration(family("phi2"), source, settings, tell=lines.append)
    assert statistics.provenance["samples"] == samples
    assert text in lines[1]
    assert ("more samples" in lines[1]) == (samples < 30 and size is None)


def test_text_goes_through_the_models_own_tokenizer():
    for name in ("phi2", "phi3_small"):
        source = open_source(ROOT / "plugins" / name / "demo")
        settings = Settings(dataset="builtin", size=2, max_length=30)
        plugin = registry.load(name.replace("_", "-")).family
        provenance = run_calibration(plugin, source, settings).provenance
        assert (provenance["samples"], provenance["tokens"]) == (2, 60)


def test_no_tokenizer_or_no_such_device(tmp_path):
    source = open_source(sources.write("phi2", tmp_path))
    with pytest.raises(UsageError) as caught:
        run_calibration(family("phi2"), source, Settings(dataset="builtin"))
    assert "tokenizer" in caught.value.message and caught.value.hint
    with pytest.raises(UsageError):
        run_calibration(family("phi2"), source, Settings(dataset="builtin", device="abacus"))


# Reuse


def test_the_file_is_reused_if_it_fits(calibrated, tmp_path):
    """A directory may move; other values under the same header are another model."""
    source, settings, statistics = calibrated
    file, lines = tmp_path / "amax", []
    save(file, statistics)
    moved = Path(shutil.copytree(source.directory, tmp_path / "moved"))
    again = phireg.calibrate(phireg.plan(moved), file, settings, tell=lines.append)
    assert again.reused and again.statistics.keys == statistics.keys
    assert len(lines) == 1
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.1.mlp.fc1.weight"] += 0.01
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    changed = phireg.plan(moved)
    assert changed.source.files[0].header_digest == source.files[0].header_digest
    with pytest.raises(SourceError) as caught:
        phireg.calibrate(changed, file, settings, required=True)
    assert str(file) in caught.value.message and caught.value.hint
    replaced = phireg.calibrate(changed, file, settings, tell=lines.append)
    assert not replaced.reused and misfit(load(file), changed.source, settings) is None
    assert str(file) in lines[1]
    file.write_bytes(b"\0" * 64)
    with pytest.raises(SourceError):
        phireg.calibrate(changed, file, settings)


def test_a_required_file_may_have_other_settings_unless_they_are_given(calibrated, tmp_path):
    source, _, statistics = calibrated
    save(tmp_path / "amax", statistics)
    plan = phireg.plan(source.directory)
    named = phireg.calibrate(plan, tmp_path / "amax", Settings(batch_size=2), required=True)
    assert named.reused
    with pytest.raises(SourceError):
        phireg.calibrate(plan, tmp_path / "amax", Settings(size=4), required=True)


def test_settings_that_matter(calibrated, tmp_path):
    source, settings, statistics = calibrated
    file = settings.file
    other = open_source(sources.write("phi3-gqa", tmp_path / "other"))
    assert misfit(statistics, other, settings)
    assert misfit(statistics, source, settings) is None
    assert misfit(statistics, source, None) is None
    assert misfit(statistics, source, Settings(file=file, batch_size=4, device="cuda")) is None
    assert "size" in misfit(statistics, source, Settings(file=file, size=4))
    assert "max_length" in misfit(statistics, source, Settings(file=file, max_length=64))
    assert "dataset" in misfit(statistics, source, Settings(dataset="builtin"))
    assert "file" in misfit(statistics, source, Settings())
    copied = Path(shutil.copy(file, tmp_path / "copy.jsonl"))
    assert misfit(statistics, source, Settings(file=copied)) is None
    copied.write_text('{"input_ids": [1]}\n')
    assert "file" in misfit(statistics, source, Settings(file=copied))
    with pytest.raises(UsageError):
        misfit(statistics, source, Settings(file=tmp_path / "nothing"))


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"max_length": 0}, {"batch_size": 0}, {"dataset": "builtin", "file": ROOT}],
)
def test_settings_that_make_no_sense(options):
    with pytest.raises(UsageError):
        Settings(**options)
