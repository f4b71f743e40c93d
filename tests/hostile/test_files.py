"""What takes the place of a file: no command waits for it, swells, or follows it elsewhere."""

import os
import shutil
from pathlib import Path

import pytest
from helpers.tiny_phi3 import INDEX, shard_path

pytestmark = pytest.mark.hostile("files that are none")


def elsewhere(path):
    """A link to a good copy beside the directory."""
    target = path.parent.parent / f"elsewhere-{path.name}"
    shutil.move(path, target)
    path.symlink_to(target)


def huge(path):
    path.write_bytes(b"")
    os.truncate(path, 2**41)


def replaced(make):
    def apply(path):
        path.unlink()
        make(path)

    return apply


THINGS = {
    "fifo": replaced(os.mkfifo),
    "zero": replaced(lambda path: path.symlink_to("/dev/zero")),
    "loop": replaced(lambda path: path.symlink_to(path.name)),
    "dangling": replaced(lambda path: path.symlink_to("nowhere")),
    "directory": replaced(lambda path: path.mkdir()),
    "elsewhere": elsewhere,
    "huge": huge,
}
SHARD = shard_path(Path()).name

# The command, and the file that it reads; {} is the working directory.
COMMANDS = {
    "plan": ("plan --model-dir {}/model", ["config.json", INDEX, SHARD]),
    "convert": (
        "convert --model-dir {}/model --output-dir {}/out",
        ["config.json", INDEX, SHARD, "tokenizer.json", "generation_config.json"],
    ),
    "explain": ("explain {}/model lm_head.weight", ["config.json"]),
    "inspect": ("inspect {}/ckpt", ["config.json", "phireg.json", "rank0.safetensors"]),
    "inspect-check": ("inspect --check {}/ckpt", ["tokenizer.json"]),
    "run": (
        "run {}/ckpt --prompt a --device cpu",
        ["config.json", "rank0.safetensors", "tokenizer.json", "generation_config.json"],
    ),
    "run-model": ("run --backend hf --model-dir {}/model --prompt a", ["config.json", SHARD]),
    "run-engine": ("run {}/engine --prompt a", ["config.json"]),
    "summarize": (
        "summarize {}/ckpt --device cpu --max-ite 1 --output-len 2 --dataset demo",
        ["config.json", "rank0.safetensors", "tokenizer.json"],
    ),
    "verify": (
        "verify {}/ckpt --model-dir {}/model --quick",
        ["model/config.json", "config.json", "rank0.safetensors", "phireg.json"],
    ),
    "postprocess": (
        "postprocess {}/ckpt --output-dir {}/out",
        ["config.json", "rank0.safetensors"],
    ),
    "build": (
        "build {}/ckpt --output-dir {}/out --print-command --trtllm-version 0.17.0",
        ["config.json", "rank0.safetensors"],
    ),
}
WHERE = {"plan": "model", "convert": "model", "explain": "model", "run-model": "model"}
CASES = [(command, file) for command, (_, files) in COMMANDS.items() for file in files]
generation_config = '{"eos_token_id": 1}'


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize(("command", "file"), CASES, ids=[f"{c}-{f}" for c, f in CASES])
def test_a_file_of_a_directory(command, file, thing, place, refused):
    default = "engine" if command == "run-engine" else WHERE.get(command, "ckpt")
    for name in ("model", "ckpt"):
        (place / name / "generation_config.json").write_text(generation_config)
    path = place / file if "/" in file else place / default / file
    THINGS[thing](path)
    words = COMMANDS[command][0].format(place, place).split()
    refused(*words, named=path.name)
    assert not (place / "out").exists()


@pytest.mark.parametrize("thing", ["fifo", "zero", "directory", "loop", "huge"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".safetensors"])
def test_a_file_that_the_user_names(thing, suffix, place, refused):
    path = place / f"named{suffix}"
    path.touch()
    THINGS[thing](path)
    quantize = f"quantize --model-dir {place}/model --output-dir {place}/out --qformat fp8"
    commands = {
        ".txt": [f"run {place}/ckpt --input-file {path}", f"{quantize} --calib-file {path}"],
        ".jsonl": [f"run {place}/ckpt --input-file {path}", f"{quantize} --calib-file {path}"],
        ".safetensors": [f"{quantize} --calib-stats {path}"],
    }
    for words in commands.get(suffix, [f"{quantize} --calib-file {path}"]):
        refused(*words.split(), "--device", "cpu", codes=(2, 3, 6), named=path.name)
    assert not (place / "out").exists()


def test_a_named_file_may_be_a_link(place):
    from helpers.command_line import run_phireg

    (place / "prompts.txt").write_text("The engine\n")
    (place / "linked.txt").symlink_to("prompts.txt")
    words = ("--max-new-tokens", "1", "--device", "cpu")
    result = run_phireg("run", place / "ckpt", "--input-file", place / "linked.txt", *words)
    assert "linked.txt" not in result.output
