"""A whole calibration: what is chosen, said and recorded, and when it serves again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import source_models as sources
from safetensors.torch import load_file, save_file

from phireg import registry
from phireg.calibration import run
from phireg.calibration.collect import Cost, collect
from phireg.calibration.run import calibrate, describe, misfit, reuse
from phireg.calibration.settings import Settings
from phireg.calibration.statistics import load, save
from phireg.errors import SourceError, UsageError
from phireg.reference.load import open_reference
from phireg.source.model import open_source

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
IDS = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def family(name):
    return registry.load(sources.MODELS[name][1]).family


@pytest.fixture
def made(tmp_path):
    """A source, settings with a file of ids, and their statistics."""
    source = open_source(sources.write("phi2", tmp_path / "source", torch.bfloat16))
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in IDS))
    settings = Settings(file=path)
    return source, settings, calibrate(family("phi2"), source, settings)


def test_the_numbers_are_those_of_the_rows(made):
    source, _, found = made
    reference = open_reference(
        family("phi2"), source, weights=None, dtype=torch.bfloat16, device=CPU
    )
    wanted = collect(reference, IDS, device=CPU)
    assert found.inputs.keys() == wanted.inputs.keys()
    assert all((found.inputs[n] == wanted.inputs[n]).all() for n in wanted.inputs)
    assert (found.keys, found.values) == (wanted.keys, wanted.values)


def test_what_is_recorded_and_said(made, tmp_path):
    source, settings, found = made
    recorded = found.provenance
    assert recorded["family"] == "phi2"
    assert recorded["source"] == {"model.safetensors": source.files[0].header_digest}
    assert (recorded["samples"], recorded["tokens"], recorded["longest"]) == (3, 9, 4)
    assert (recorded["dtype"], recorded["device"]) == ("bfloat16", "cpu")
    assert recorded["data"] == str(settings.file)
    assert recorded["settings"]["size"] is None
    assert recorded["versions"]["torch"] == torch.__version__
    assert describe(recorded) == (
        f"calibration: 3 samples of up to 4 tokens (9 in all) from {settings.file}; bfloat16 on cpu"
    )
    save(tmp_path / "amax", found)
    assert load(tmp_path / "amax").provenance == recorded
    lines, steps = [], []
    calibrate(
        family("phi2"), source, settings,
        progress=lambda more, total: steps.append(more), tell=lines.append,
    )  # fmt: skip
    assert lines[0] == describe(recorded)
    assert lines[1].startswith("this takes about")
    assert sum(steps) == 27


@pytest.mark.parametrize(
    ("stored", "computed"),
    [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")],
)
def test_a_cpu_never_computes_in_float16(tmp_path, stored, computed):
    source = open_source(sources.write("phi2", tmp_path, getattr(torch, stored)))
    assert str(run._compute_dtype(source, CPU)) == f"torch.{computed}"
    assert str(run._compute_dtype(source, torch.device("cuda"))) == f"torch.{stored}"


@pytest.mark.parametrize(
    ("seconds_per_token", "size", "samples", "said"),
    [
        (1e-3, None, 30, None),
        (2.0, None, 15, "15 more samples would take longer"),
        (20.0, None, 8, "27 minutes"),
        (20.0, 3, 3, "10 minutes"),
        (20.0, 30, 30, "100 minutes"),
    ],
)
def test_the_default_size_ends_in_reasonable_time(
    tmp_path, monkeypatch, seconds_per_token, size, samples, said
):
    """Rows of 10 tokens; 300 seconds and 8 samples are what is granted."""
    source = open_source(sources.write("phi2", tmp_path / "source"))
    path = tmp_path / "ids.jsonl"
    path.write_text((json.dumps({"input_ids": list(range(10))}) + "\n") * 30)
    monkeypatch.setattr(run, "measure", lambda *_, **__: Cost(0.0, seconds_per_token))
    lines = []
    settings = Settings(file=path, size=size)
    found = calibrate(family("phi2"), source, settings, tell=lines.append)
    assert found.provenance["samples"] == samples
    assert f"calibration: {samples} samples" in lines[0]
    if said is None:
        assert "more samples" not in lines[1]
    else:
        assert said in lines[1]


def test_text_goes_through_the_models_own_tokenizer():
    for name in ("phi2", "phi3_small"):
        source = open_source(ROOT / "plugins" / name / "demo")
        settings = Settings(dataset="builtin", size=2, max_length=30)
        found = calibrate(registry.load(name.replace("_", "-")).family, source, settings)
        assert (found.provenance["samples"], found.provenance["tokens"]) == (2, 60)


def test_without_a_tokenizer(tmp_path):
    source = open_source(sources.write("phi2", tmp_path))
    with pytest.raises(SourceError, match="holds no tokenizer to calibrate with"):
        calibrate(family("phi2"), source, Settings(dataset="builtin"))
    with pytest.raises(UsageError, match="unknown device"):
        calibrate(family("phi2"), source, Settings(dataset="builtin", device="abacus"))


# Serving again


def test_a_moved_directory_is_still_the_same_model(made, tmp_path):
    source, settings, found = made
    save(tmp_path / "amax", found)
    moved = open_source(Path(shutil.copytree(source.directory, tmp_path / "moved")))
    said = []
    again = reuse(tmp_path / "amax", moved, settings, said.append)
    assert again is not None
    assert again.keys == found.keys
    assert reuse(tmp_path / "nothing", moved, settings, said.append) is None
    assert said == []


def test_other_values_under_the_same_header_are_another_model(made, tmp_path):
    source, settings, found = made
    other = Path(shutil.copytree(source.directory, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.fc1.weight"] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    changed = open_source(other)
    assert changed.files[0].header_digest == source.files[0].header_digest
    assert "other values" in misfit(found, changed, settings)
    save(tmp_path / "amax", found)
    said = []
    assert reuse(tmp_path / "amax", changed, None, said.append) is None
    assert said == [f"{tmp_path / 'amax'} does not serve: {misfit(found, changed, None)}"]


def test_other_files_are_another_model(made, tmp_path):
    _, settings, found = made
    other = open_source(sources.write("phi3-gqa", tmp_path / "other"))
    assert "other weights files" in misfit(found, other, settings)


def test_settings_that_matter(made, tmp_path):
    source, settings, found = made
    file = settings.file
    assert misfit(found, source, settings) is None
    assert misfit(found, source, None) is None
    assert misfit(found, source, Settings(file=file, batch_size=4, device="cuda")) is None
    assert "size left open, not 4" in misfit(found, source, Settings(file=file, size=4))
    assert "max_length 512, not 64" in misfit(found, source, Settings(file=file, max_length=64))
    assert "dataset auto, not builtin" in misfit(found, source, Settings(dataset="builtin"))
    assert "file" in misfit(found, source, Settings())
    copied = shutil.copy(file, tmp_path / "copy.jsonl")
    assert misfit(found, source, Settings(file=Path(copied))) is None
    Path(copied).write_text('{"input_ids": [1]}\n')
    assert "file" in misfit(found, source, Settings(file=Path(copied)))
    with pytest.raises(UsageError, match="cannot read"):
        misfit(found, source, Settings(file=tmp_path / "nothing"))


def test_a_damaged_file_is_an_error(made, tmp_path):
    source, settings, _ = made
    (tmp_path / "amax").write_bytes(b"\0" * 64)
    with pytest.raises(SourceError, match="not a readable"):
        reuse(tmp_path / "amax", source, settings)
