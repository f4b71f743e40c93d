"""The demo models end to end: executor beside hf, in one process and in two, whole and broken."""

import json

import pytest
from helpers.command_line import run_phireg
from helpers.forks import run_forked
from safetensors.torch import load_file, save_file

from phireg import demo

FAMILIES = ("phi2", "phi3-mini", "phi3-small", "phi3-medium")
FLOAT32 = ("--data-type", "float32", "--hf-data-type", "float32", "--device", "cpu")
CHECK = ("--check-accuracy", "--tensorrt-llm-rouge1-threshold", "85")
ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def hf(family):
    return ("--test-hf", "--hf-model-dir", str(demo.find(family).directory), *FLOAT32)


def assert_alike(output, count):
    executor, source = output["backends"]
    assert (executor["backend"], source["backend"]) == ("executor", "hf")
    for name in ROUGES:
        assert executor[name] == pytest.approx(source[name], abs=0.01)
    assert executor["rouge1"] > 90
    assert executor["perplexity"] == pytest.approx(source["perplexity"], rel=1e-4)
    assert [a["backend"] for a in output["checks"]] == ["executor", "executor"]
    assert len(output["articles"]) == count
    assert output["same_summaries"] == [{"between": ["executor", "hf"], "count": count}]


@pytest.mark.parametrize("family", FAMILIES)
def test_executor_and_hf_are_alike(family, checkpoint, document):
    options = (*hf(family), *CHECK, "--eval-ppl", "--max-ite", 3, "--batch-size", 2)
    assert_alike(document(checkpoint(family), *options), 6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi3-small"])
def test_two_processes_are_alike(family, checkpoint):
    words = ["summarize", checkpoint(family, 2), "--tp", 2, *hf(family), *CHECK, "--eval-ppl"]
    ran = run_forked([*words, "--max-ite", 3, "--json"])
    assert ran.returncode == 0, ran.stderr
    assert_alike(json.loads(ran.stdout), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "qformat"), [*zip(FAMILIES, ("fp8", "int8_sq") * 2, strict=True)]
)
def test_a_quantized_checkpoint_passes(family, qformat, document, tmp_path):
    out = tmp_path / "quantized"
    options = ["--qformat", qformat, "--kv-cache-dtype", qformat.partition("_")[0]]
    options += ["--calib-size", "16", "--no-measure", "--device", "cpu"]
    done = run_phireg(
        *("quantize", "--model-dir", demo.find(family).directory, "--output-dir", out), *options
    )
    assert done.exit_code == 0, done.output
    output = document(out, *hf(family), *CHECK, "--max-ite", 2, "--batch-size", 4)
    executor, source = output["backends"]
    assert executor["rouge1"] > 85
    assert executor["rouge1"] == pytest.approx(source["rouge1"], abs=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_broken_checkpoint_misses_the_threshold(family, checkpoint, run, tmp_path):
    """The rows of q and k change places in every layer."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint(family).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "rank0.safetensors")
    names = [name for name in weights if name.endswith("attention.qkv.weight")]
    for name in names:
        rows = len(weights[name])
        weights[name] = weights[name].roll(rows // 3, dims=0)
    assert names
    save_file(weights, broken / "rank0.safetensors")
    options = (*FLOAT32, "--max-ite", 1, "--batch-size", 4)
    assert run(checkpoint(family), *options, *CHECK).exit_code == 0
    result = run(broken, *options, *CHECK)
    assert result.exit_code == 4, result.output
    assert "FAILED  executor: rouge1" in result.stdout
