"""Engines by the real compiler, from checkpoints to directories."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import cache

import pytest
from compiling import compile_spec
from helpers.command_line import run_phireg
from specs import DEMOS, FAMILIES, spec_of

import phireg
from phireg.errors import PhiregError
from phireg.planning.plan import plan_config
from phireg.tensorrt import requirements
from phireg.tensorrt.compiler import compile_rank
from phireg.tensorrt.engine import Limits, read_native
from phireg.tensorrt.job import Job
from phireg.tensorrt.package import load_engine, load_package

LIMITS = Limits(max_batch_size=2, max_input_len=100, max_seq_len=128, max_chunk_len=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @cache
    def make(family, tp_size=1):
        output = tmp_path_factory.mktemp("ckpt") / family
        model = DEMOS / family.replace("-", "_") / "demo"
        phireg.convert(phireg.plan(model, dtype="float16", tp_size=tp_size), output)
        return output

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_demo_models_build(family, checkpoint, tmp_path, capsys):
    """All layers, all weights of the checkpoint, in the process that tests."""
    source = checkpoint(family)
    config = json.loads((source / "config.json").read_text())
    job = Job("tensorrt-rtx", config, str(source), str(tmp_path), ("sm89",), "embedded", LIMITS, 1)
    record = compile_rank(job, 0)
    size = (tmp_path / "rank0.engine").stat().st_size
    weights = (source / "rank0.safetensors").stat().st_size
    assert record["bytes"] == size > weights
    heads, width = config["num_key_value_heads"], config["hidden_size"]
    shape = [-1, heads, 128, width // config["num_attention_heads"]]
    tensors = {tensor["name"]: tensor for tensor in record["inputs"] + record["outputs"]}
    layers = config["num_hidden_layers"]
    for name in ("cache_k", "cache_v", "present_k", "present_v"):
        assert tensors[f"{name}_{layers - 1}"] == {
            "name": f"{name}_{layers - 1}", "dtype": "half", "shape": shape,
        }  # fmt: skip
    assert tensors["logits"]["shape"] == [-1, config["vocab_size"]]
    assert len(tensors) == 4 * layers + 4 + ("rope_offsets" in tensors)
    assert ("rope_offsets" in tensors) == ("longrope_scaling_short_factors" in config)


def test_an_fp8_model_builds():
    assert compile_spec(spec_of("phi3-small", "fp8"), ("sm89", "sm120"))


def test_from_a_checkpoint_to_a_directory(checkpoint, tmp_path):
    source, engine = checkpoint("phi3-mini"), tmp_path / "engine"
    options = "--backend", "tensorrt-rtx", "--gpu", "sm89", "--max-seq-len", 64
    built = run_phireg("build", source, "--output-dir", engine, *options, "--json", "--quiet")
    assert built.exit_code == 0, built.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "engine.build.log"]
    assert (engine / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    found = read_native(engine)
    assert (found.gpus, found.limits.max_seq_len) == (("sm89",), 64)
    assert found.checkpoint_dir == source.resolve()
    record = json.loads((engine / "phireg-build.json").read_text())
    assert record["version"].startswith("1.")
    assert record["checkpoint"]["files"]["rank0.safetensors"]["tensors"]
    document = json.loads(built.stdout)
    assert document["files"]["rank0.engine"] == found.path(0).stat().st_size

    inspected = run_phireg("inspect", engine, "--check", "--json")
    assert inspected.exit_code == 0, inspected.output
    assert json.loads(inspected.stdout)["problems"] == []
    data = bytearray(found.path(0).read_bytes())
    data[len(data) // 2] ^= 1
    found.path(0).write_bytes(data)
    assert run_phireg("inspect", engine).exit_code == 0
    text = run_phireg("inspect", engine, "--check").stdout.splitlines()
    assert "1 problem" in text[1]
    assert "rank0.engine" in text[-1]
    again = run_phireg("build", source, "--output-dir", engine, *options, "--quiet")
    assert again.exit_code == 6  # it exists
    manifest = json.loads((engine / "phireg-build.json").read_text())
    for ranks in ([3], [manifest["ranks"][0] | {"inputs": [3]}]):
        (engine / "phireg-build.json").write_text(json.dumps(manifest | {"ranks": ranks}))
        assert run_phireg("inspect", engine).exit_code == 3
    for name in ("rank0.engine", "config.json"):  # neither an engine nor empty
        with pytest.raises(PhiregError):
            load_engine(load_package("tensorrt-rtx"), engine / name)


@pytest.mark.slow
def test_two_ranks_side_by_side_and_weights_as_inputs(checkpoint, tmp_path):
    options = phireg.BuildOptions(workers=2, gpus=("sm89",), weights="separate")
    plan = phireg.plan_build(
        checkpoint("phi2", 2), tmp_path / "engine", options, backend="tensorrt-rtx"
    )
    stages = []
    built = phireg.build(plan, listen=stages.append)
    assert {stage["rank"] for stage in stages} == {0, 1}
    assert max(stage.get("done", 0) for stage in stages) > 1
    names = {tensor["name"] for tensor in built.ranks[1]["inputs"]}
    assert "transformer.layers.5.mlp.proj.bias" in names


def test_a_rank_that_a_signal_ends(tmp_path):
    """Whoever started all ranks sees the signal, as with one rank."""
    config = plan_config(DEMOS / "phi2" / "demo", tp_size=2).config
    job = Job("tensorrt-rtx", dict(config), None, str(tmp_path), (), "separate", LIMITS, 1)
    (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
    script = "from phireg.tensorrt import compiler; compiler._run_each = lambda *_: -9; "
    command = [sys.executable, "-c", script + "compiler.main()", tmp_path / "job.json"]
    assert subprocess.run(command, check=False).returncode == -9


def test_a_rank_that_fails_is_told_while_others_go_on():
    script = (
        "import sys; from phireg.tensorrt import compiler; compiler.command = lambda path: "
        "['/bin/sh', '-c', '[ $0 = 0 ] && sleep 20; exit 7']; "
        "sys.exit(compiler._run_each(None, 2, 2))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=19).returncode == 7


@pytest.mark.slow
def test_without_a_checkpoint(tmp_path):
    built = run_phireg(
        "build", "--backend", "tensorrt-rtx", "--dummy-weights", "--model-dir",
        DEMOS / "phi2" / "demo", "--output-dir", tmp_path / "engine", "--quiet", "--gpu", "12.0",
    )  # fmt: skip
    assert built.exit_code == 0, built.output
    found = read_native(tmp_path / "engine")
    assert (found.weights, found.checkpoint_dir) == ("separate", None)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(checkpoint, tmp_path):
    command = [
        sys.executable, "-m", "phireg", "build", checkpoint("phi3-small"), "--output-dir",
        tmp_path / "engine", "--backend", "tensorrt-rtx",
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "engine.build.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "describing" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "no engine was written" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["engine.build.log"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_what_the_compiler_refuses_unforeseen(tmp_path, monkeypatch):
    """Its own words are shown, and there is no directory."""
    monkeypatch.setattr(requirements, "required_capabilities", lambda spec: {})
    checkpoint, engine = tmp_path / "ckpt", tmp_path / "engine"
    phireg.convert(phireg.plan(DEMOS / "phi3_medium" / "demo", dtype="bfloat16"), checkpoint)
    options = "--backend", "tensorrt-rtx", "--gpu", "sm75", "--quiet"
    failed = run_phireg("build", checkpoint, "--output-dir", engine, *options)
    assert failed.exit_code == 7
    assert "HW-specific datatypes" in failed.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "engine.build.log"]
