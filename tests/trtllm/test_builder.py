"""phireg build with a stand-in for the builder: its arguments, and what becomes of its output."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from phireg.trtllm import builder
from phireg.trtllm.engine import read_engine


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def build(run, checkpoint, tmp_path, *more):
    return run("build", checkpoint, "--output-dir", tmp_path / "engine", *more)


# Engines


def test_an_engine_is_built(run, fake, checkpoint, tmp_path):
    done = build(run, checkpoint, tmp_path, "--max_batch_size", 4, "--gemm-plugin", "auto")
    assert done.exit_code == 0, done.output
    given = fake.arguments
    assert given[:2] == ["--checkpoint_dir", str(checkpoint)]
    assert given[2] == "--output_dir"
    assert given[4:] == ["--max_batch_size", "4", "--gemm_plugin", "auto"]
    engine = tmp_path / "engine"
    assert listing(engine) == ["config.json", "phireg-build.json", "rank0.engine", "tokenizer.json"]
    assert (engine / "rank0.engine").read_bytes() == b"engine of rank 0"
    assert listing(tmp_path) == ["bin", "engine", "engine.build.log"]
    log = (tmp_path / "engine.build.log").read_text()
    assert log.startswith(f"{fake.program} --checkpoint_dir {checkpoint} ")
    assert "Total time of building all engines" in log
    assert "Serializing engine to" in done.output
    assert "TensorRT-LLM 1.2.1" in done.output
    assert read_engine(engine).max_batch_size == 4


def test_json(run, fake, split, tmp_path):
    fake.behave(version="0.12.0")
    done = build(run, split, tmp_path, "--context-fmha-fp32-acc", "enable", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert document["trtllm_version"] == "0.12.0"
    assert document["tp_size"] == 2
    assert document["run_options"] == {"enable_context_fmha_fp32_acc": True}
    assert "rank1.engine" in document["files"]
    assert read_engine(tmp_path / "engine").run_options == document["run_options"]
    assert "--context_fmha_fp32_acc" not in fake.arguments


def test_flags_after_two_hyphens_are_passed_on(run, fake, checkpoint, tmp_path):
    done = build(run, checkpoint, tmp_path, "--workers", 1, "--", "--max_num_tokens", "99")
    assert done.exit_code == 0, done.output
    assert fake.arguments[-4:] == ["--workers", "1", "--max_num_tokens", "99"]


def test_an_existing_engine_is_replaced_only_if_asked(run, fake, checkpoint, tmp_path):
    assert build(run, checkpoint, tmp_path).exit_code == 0
    before = (tmp_path / "engine" / "config.json").read_text()
    refused = build(run, checkpoint, tmp_path, "--max-batch-size", 7)
    assert refused.exit_code == 6
    assert "--overwrite" in refused.output
    assert (tmp_path / "engine" / "config.json").read_text() == before
    assert build(run, checkpoint, tmp_path, "--max-batch-size", 7, "--overwrite").exit_code == 0
    assert read_engine(tmp_path / "engine").max_batch_size == 7


def test_only_an_engine_is_replaced(run, fake, checkpoint, tmp_path):
    assert build(run, checkpoint, tmp_path).exit_code == 0
    (tmp_path / "engine" / "thesis.tex").write_text("years")
    refused = build(run, checkpoint, tmp_path, "--overwrite")
    assert refused.exit_code == 6
    assert "thesis.tex" in refused.output
    assert (tmp_path / "engine" / "thesis.tex").exists()


def test_without_weights(run, fake, model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    arguments = ("build", "--dummy-weights", "--family", "phi3-mini", "--model-dir", bare,
                 "--tp-size", 2, "--output-dir", tmp_path / "engine")  # fmt: skip
    done = run(*arguments, "--", "--max_num_tokens", "99")
    assert done.exit_code == 0, done.output
    given = fake.arguments
    assert given[0] == "--model_config"
    assert not Path(given[1]).exists()  # it was temporary
    assert given[-2:] == ["--max_num_tokens", "99"]
    engine = read_engine(tmp_path / "engine")
    assert (engine.architecture, engine.world_size) == ("Phi3ForCausalLM", 2)
    # The builder got the config that a conversion writes.
    shown = json.loads(run(*arguments, "--print-command", "--json").output)
    written = json.loads((engine.directory / "config.json").read_text())
    assert written["pretrained_config"] == shown["config"]


# --print-command


def test_print_command(run, split, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    flags = ("--max_input_len", 16, "--max_output_len", 8, "--context_fmha_fp32_acc", "enable",
             "--print-command", "--trtllm-version", "0.14.0")  # fmt: skip
    shown = build(run, split, tmp_path, *flags)
    assert shown.exit_code == 0
    line = f"trtllm-build --checkpoint_dir {split} --output_dir {tmp_path / 'engine'} "
    line += "--max_input_len 16 --max_seq_len 24"
    assert shown.stdout == f"{line}\n"
    document = json.loads(build(run, split, tmp_path, *flags, "--json").stdout)
    assert document["command"] == line.split()
    assert document["run_options"] == {"enable_context_fmha_fp32_acc": True}
    assert len(document["notes"]) == 1
    assert document["files"] is None
    assert listing(tmp_path) == []


def test_a_directory_that_looks_like_a_config(run, checkpoint, tmp_path):
    (tmp_path / "ckpt.json").symlink_to(checkpoint)
    shown = run("build", tmp_path / "ckpt.json", "--output-dir", tmp_path / "engine",
                "--print-command", "--trtllm-version", "1.2.1")  # fmt: skip
    # The builder takes every path that ends so for a config without weights.
    assert f"--checkpoint_dir {tmp_path / 'ckpt.json'}/ " in shown.output


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
        (("{ckpt}", "--max-batch-size", "0"), 2, "max-batch-size"),
        (("{ckpt}", "--", "--output_dir", "x"), 2, "--output_dir"),
        (("{ckpt}", "--print-command", "--trtllm-version", "1.4"), 7, "1.4"),
    ],
)
def test_refusals(run, fake, checkpoint, model, tmp_path, arguments, exit_code, names):
    places = {"ckpt": checkpoint, "model": model, "tmp": tmp_path}
    done = run(
        "build", "--output-dir", tmp_path / "engine",
        *(argument.format(**places) for argument in arguments),
    )  # fmt: skip
    assert done.exit_code == exit_code, done.output
    assert names in done.output
    assert listing(tmp_path) == ["bin"]
    assert not (fake.directory / "arguments.json").exists()


def test_a_wrong_checkpoint_is_refused_before_the_builder_starts(run, fake, split, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "rank0.safetensors"):
        (broken / name).write_bytes((split / name).read_bytes())
    done = build(run, broken, tmp_path)
    assert done.exit_code == 4
    assert "rank1.safetensors" in done.output
    assert not (fake.directory / "arguments.json").exists()


# Finding the builder


def test_no_builder(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    done = build(run, checkpoint, tmp_path)
    assert done.exit_code == 7
    assert "pip install tensorrt_llm==1.2.1" in done.output
    shown = build(run, checkpoint, tmp_path, "--print-command")
    assert shown.exit_code == 7
    assert "--trtllm-version" in shown.output


def test_a_builder_of_a_release_without_engines(run, fake, checkpoint, tmp_path):
    fake.behave(version="1.3.0rc22")
    done = build(run, checkpoint, tmp_path)
    assert done.exit_code == 7
    assert "1.3.0rc22" in done.output


def test_the_version_comes_from_the_builders_interpreter(run, fake, checkpoint, tmp_path):
    python = fake.directory / "python3.10"
    python.write_text("#!/bin/sh\necho 0.17.0\n")
    python.chmod(0o755)
    fake.program.write_text(f"#!{python}\n")
    shown = build(run, checkpoint, tmp_path, "--print-command", "--json")
    assert json.loads(shown.stdout)["trtllm_version"] == "0.17.0"


def test_a_builder_that_says_nothing(run, fake, checkpoint, tmp_path):
    fake.program.write_text("#!/bin/sh\necho hello\n")
    done = build(run, checkpoint, tmp_path)
    assert done.exit_code == 7
    assert str(fake.program) in done.output


# Failures


def test_a_failure_shows_the_end_of_the_log(run, fake, checkpoint, tmp_path):
    printed = "\n".join(f"step {n}" for n in range(500))
    fake.fail(printed)
    done = build(run, checkpoint, tmp_path, "--quiet")
    assert done.exit_code == 7
    assert "ended with 1" in done.output
    assert "step 499" in done.output
    assert "step 30\n" not in done.output
    assert "engine.build.log" in done.output
    assert printed in (tmp_path / "engine.build.log").read_text()
    assert listing(tmp_path) == ["bin", "engine.build.log"]


def test_a_builder_that_was_killed(run, fake, checkpoint, tmp_path):
    fake.behave(mode="killed")
    done = build(run, checkpoint, tmp_path, "--quiet")
    assert done.exit_code == 7
    assert "signal 9" in done.output


def test_an_incomplete_engine_is_none(run, fake, split, tmp_path):
    fake.behave(mode="incomplete")
    done = build(run, split, tmp_path, "--quiet")
    assert done.exit_code == 7
    assert "has no rank1.engine" in done.output
    assert listing(tmp_path) == ["bin", "engine.build.log"]


def test_an_old_engine_survives_a_failure(run, fake, checkpoint, tmp_path):
    assert build(run, checkpoint, tmp_path).exit_code == 0
    before = (tmp_path / "engine" / "rank0.engine").read_bytes()
    fake.fail("out of memory")
    assert build(run, checkpoint, tmp_path, "--overwrite").exit_code == 7
    assert (tmp_path / "engine" / "rank0.engine").read_bytes() == before


# Streaming and interruption


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_output_comes_as_it_is_made(start, fake, checkpoint, tmp_path):
    fake.behave(pause=1)
    process = start("build", checkpoint, "--output-dir", tmp_path / "engine")
    for line in process.stderr:
        if "Build TensorRT engine" in line:
            break
    # The builder is at work for a second more.
    assert not (tmp_path / "engine").exists()
    assert "Build TensorRT engine" in (tmp_path / "engine.build.log").read_text()
    assert process.poll() is None
    assert process.wait(30) == 0
    assert (tmp_path / "engine" / "rank0.engine").exists()
    process.communicate()


def lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie has ended


@pytest.mark.parametrize(
    ("number", "word", "stubborn"),
    [
        (signal.SIGINT, "interrupted", False),
        (signal.SIGTERM, "terminated", False),
        pytest.param(signal.SIGINT, "interrupted", True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_nothing(start, fake, checkpoint, tmp_path, number, word, stubborn):
    fake.behave(mode="slow")
    if stubborn:
        fake.behave(stubborn=1)
    process = start("build", checkpoint, "--output-dir", tmp_path / "engine")
    for line in process.stderr:
        if "Build TensorRT engine" in line:
            break
    pids = [int(pid) for pid in (fake.directory / "pids").read_text().split()]
    assert all(lives(pid) for pid in pids)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"{word}; no engine was written" in stderr
    wait_for(lambda: not any(lives(pid) for pid in pids), 5)
    assert listing(tmp_path) == ["bin", "engine.build.log"]


def test_a_signal_while_the_builder_is_being_started(tmp_path, monkeypatch):
    """It arrives after the fork; the process must not be forgotten."""
    started = []

    class Popen(builder.subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(builder.subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt):
        builder.run_builder([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert len(started) == 1
    assert not lives(started[0])
