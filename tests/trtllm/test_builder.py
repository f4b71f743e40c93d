"""phireg build with a stand-in for the builder: its arguments, and what becomes of its output."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import run_phireg
from helpers.processes import ends, lives

from phireg import children
from phireg.trtllm import builder
from phireg.trtllm.engine import read_engine


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def build(checkpoint, tmp_path):
    def run(*options, source=checkpoint, exit_code=0):
        result = run_phireg("build", source, "--output-dir", tmp_path / "engine", *options)
        assert result.exit_code == exit_code, result.output
        return result

    return run


# Engines


def test_an_engine_is_built(build, fake, checkpoint, tmp_path):
    output = build(
        *("--max_batch_size", 4, "--gemm-plugin", "auto", "--", "--max_num_tokens", "99")
    ).output
    arguments = fake.arguments
    assert arguments[:2] == ["--checkpoint_dir", str(checkpoint)]
    assert arguments[2] == "--output_dir"
    flags = "--max_batch_size 4 --gemm_plugin auto --max_num_tokens 99"
    assert arguments[4:] == flags.split()
    engine = tmp_path / "engine"
    assert listing(engine) == ["config.json", "phireg-build.json", "rank0.engine", "tokenizer.json"]
    assert (engine / "rank0.engine").read_bytes() == b"engine of rank 0"
    assert listing(tmp_path) == ["bin", "engine", "engine.build.log"]
    log = (tmp_path / "engine.build.log").read_text()
    assert f"\n{fake.program} --checkpoint_dir {checkpoint} " in log
    assert "Total time of building all engines" in log
    assert "Serializing engine to" in output
    assert read_engine(engine).max_batch_size == 4


def test_json(build, fake, split, tmp_path):
    fake.behave(version="0.12.0")
    result = build("--context-fmha-fp32-acc", "enable", "--json", "--quiet", source=split)
    document = json.loads(result.output)
    assert document["trtllm_version"] == "0.12.0"
    assert document["tp_size"] == 2
    assert document["run_options"] == {"enable_context_fmha_fp32_acc": True}
    assert "rank1.engine" in document["files"]
    assert read_engine(tmp_path / "engine").run_options == document["run_options"]
    assert "--context_fmha_fp32_acc" not in fake.arguments


def test_an_existing_engine_is_replaced_only_on_demand(build, fake, tmp_path):
    build()
    engine = tmp_path / "engine"
    before = (engine / "config.json").read_text()
    assert "--overwrite" in build("--max-batch-size", 7, exit_code=6).output
    fake.fail("out of memory")
    build("--overwrite", exit_code=7)
    assert (engine / "config.json").read_text() == before
    fake.behave(mode="good")
    build("--max-batch-size", 7, "--overwrite")
    assert read_engine(engine).max_batch_size == 7
    (engine / "thesis.tex").write_text("years")
    assert "thesis.tex" in build("--overwrite", exit_code=6).output
    assert (engine / "thesis.tex").exists()


def test_without_weights(fake, model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    arguments = ("build", "--dummy-weights", "--family", "phi3-mini", "--model-dir", bare,
                 "--tp-size", 2, "--output-dir", tmp_path / "engine")  # fmt: skip
    result = run_phireg(*arguments)
    assert result.exit_code == 0, result.output
    assert fake.arguments[0] == "--model_config"
    assert not Path(fake.arguments[1]).exists()  # it was temporary
    engine = read_engine(tmp_path / "engine")
    assert (engine.architecture, engine.world_size) == ("Phi3ForCausalLM", 2)
    # The builder got the config that a conversion writes.
    shown = json.loads(run_phireg(*arguments, "--print-command", "--json").output)
    written = json.loads((engine.directory / "config.json").read_text())
    assert written["pretrained_config"] == shown["config"]


# --print-command


def test_print_command(build, split, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    flags = ("--max_input_len", 16, "--max_output_len", 8, "--context_fmha_fp32_acc", "enable",
             "--print-command", "--trtllm-version", "0.14.0")  # fmt: skip
    line = f"trtllm-build --checkpoint_dir {split} --output_dir {tmp_path / 'engine'} "
    line += "--max_input_len 16 --max_seq_len 24"
    assert build(*flags, source=split).stdout == f"{line}\n"
    document = json.loads(build(*flags, "--json", source=split).stdout)
    assert document["command"] == line.split()
    assert document["run_options"] == {"enable_context_fmha_fp32_acc": True}
    assert len(document["notes"]) == 1
    assert document["files"] is None
    # The builder takes every path that ends with .json for a config without weights.
    link = tmp_path / "ckpt.json"
    link.symlink_to(split)
    assert f"--checkpoint_dir {link}/ " in build(*flags, source=link).output
    assert listing(tmp_path) == ["ckpt.json"]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "exit_code", "names"),
    [
        ((), 2, "phireg build CKPT"),
        (("{ckpt}", "--family", "phi2"), 2, "--family"),
        (("{ckpt}", "--trtllm-version", "1.2.1"), 2, "--print-command"),
        (("{ckpt}", "--dummy-weights"), 2, "--model-dir"),
        (("--dummy-weights", "--model-dir", "{tmp}/no"), 3, "/no"),
        (("{tmp}/no",), 3, "/no"),
        (("{model}",), 3, "Hugging Face model"),
        (("{ckpt}", "--", "--output_dir", "x"), 2, "--output_dir"),
        (("{ckpt}", "--print-command", "--trtllm-version", "1.4"), 7, "1.4"),
    ],
)
def test_refusals(fake, checkpoint, model, tmp_path, arguments, exit_code, names):
    directories = {"ckpt": checkpoint, "model": model, "tmp": tmp_path}
    arguments = (argument.format(**directories) for argument in arguments)
    result = run_phireg("build", "--output-dir", tmp_path / "engine", *arguments)
    assert result.exit_code == exit_code, result.output
    assert names in result.output
    assert listing(tmp_path) == ["bin"]
    assert listing(fake.directory) == ["trtllm-build"]


def test_a_wrong_checkpoint_is_refused_before_the_builder_starts(build, fake, split, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "rank0.safetensors"):
        (broken / name).write_bytes((split / name).read_bytes())
    assert "rank1.safetensors" in build(source=broken, exit_code=4).output
    assert listing(fake.directory) == ["trtllm-build"]


# Finding the builder


TRTLLM = ("--backend", "tensorrt-llm")


def test_no_builder(build, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "pip install tensorrt_llm==1.2.1" in build(*TRTLLM, exit_code=7).output
    assert "--trtllm-version" in build(*TRTLLM, "--print-command", exit_code=7).output


def test_the_version_comes_from_the_builders_interpreter(build, fake):
    python = fake.directory / "python3.10"
    python.write_text("#!/bin/sh\necho 0.17.0\n")
    python.chmod(0o755)
    fake.program.write_text(f"#!{python}\n")
    shown = build("--print-command", "--json")
    assert json.loads(shown.stdout)["trtllm_version"] == "0.17.0"


def test_a_builder_that_cannot_be_used(build, fake):
    fake.behave(version="1.3.0rc22")  # without engines
    assert "1.3.0rc22" in build(*TRTLLM, exit_code=7).output
    fake.program.write_text("#!/bin/sh\necho hello\n")
    assert str(fake.program) in build(*TRTLLM, exit_code=7).output


# Failures


def test_a_failure_shows_the_end_of_the_log(build, fake, tmp_path):
    printed = "\n".join(f"step {n}" for n in range(500))
    fake.fail(printed)
    output = build("--quiet", exit_code=7).output
    assert "step 499" in output
    assert "step 30\n" not in output
    assert "engine.build.log" in output
    assert printed in (tmp_path / "engine.build.log").read_text()
    assert listing(tmp_path) == ["bin", "engine.build.log"]


@pytest.mark.parametrize(
    ("mode", "names"), [("killed", "signal 9"), ("incomplete", "rank1.engine")]
)
def test_an_incomplete_engine_is_none(build, fake, split, tmp_path, mode, names):
    fake.behave(mode=mode)
    assert names in build("--quiet", source=split, exit_code=7).output
    assert listing(tmp_path) == ["bin", "engine.build.log"]


def test_a_link_in_the_place_of_the_log_is_not_followed(build, fake, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (tmp_path / "engine.build.log").symlink_to(precious)
    assert "engine.build.log" in build(exit_code=6).output
    assert precious.read_text() == "years of work"
    assert listing(tmp_path) == ["bin", "engine.build.log", "precious"]
    assert listing(fake.directory) == ["trtllm-build"]


# Interruption


STUBBORN = pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("number", "stubborn"), [(signal.SIGINT, False), (signal.SIGTERM, False), STUBBORN]
)
def test_a_signal_leaves_nothing(checkpoint, fake, tmp_path, number, stubborn):
    fake.behave(mode="slow", **({"stubborn": 1} if stubborn else {}))
    command = [sys.executable, "-m", "phireg", "build", checkpoint]
    process = subprocess.Popen(
        [*command, "--output-dir", tmp_path / "engine"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    # The builder's output is streamed while it works.
    assert any("Build TensorRT engine" in line for line in process.stderr)
    pids = [int(pid) for pid in (fake.directory / "pids").read_text().split()]
    assert all(lives(pid) for pid in pids)
    assert "Build TensorRT engine" in (tmp_path / "engine.build.log").read_text()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "no engine was written" in stderr
    assert all(ends(pid) for pid in pids)
    assert listing(tmp_path) == ["bin", "engine.build.log"]


def test_a_signal_while_the_builder_is_being_started(monkeypatch):
    """It arrives after the fork; the process must not be forgotten."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt):
        builder.run_builder([sys.executable, "-c", "import time; time.sleep(60)"], io.BytesIO())
    assert len(started) == 1
    assert not lives(started[0])


def test_what_the_builder_leaves_behind_is_not_waited_for():
    """It has left the group too, and keeps the pipe open."""
    script = """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
print("pid", os.getpid(), flush=True)
print("a line without end", end="")
"""
    command = children.python_command(script)
    log = io.BytesIO()
    code, lines = builder.run_builder(command, log)
    assert code == 0
    assert lines[-1] == "a line without end"
    assert log.getvalue().decode() == "\n".join(lines)
