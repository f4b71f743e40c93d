"""What may stand for a path on the command line: too long, the root, a device, a name in bytes."""

import os
import shutil

import pytest
from helpers.command_line import run_phireg

pytestmark = pytest.mark.hostile("arguments")

COMMANDS = [
    "plan --model-dir @",
    "convert --model-dir @ --output-dir {}/out",
    "convert --model-dir {}/model --output-dir @",
    "explain @ lm_head.weight",
    "inspect @",
    "run @ --prompt a",
    "run {}/ckpt --prompt a --tokenizer-dir @",
    "run {}/ckpt --input-file @",
    "summarize @ --dataset demo",
    "verify @ --model-dir {}/model",
    "verify {}/ckpt --model-dir @",
    "verify {}/ckpt --model-dir {}/model --quick --report @",
    "postprocess @",
    "postprocess {}/ckpt --output-dir @",
    "quantize --model-dir @ --output-dir {}/out --qformat fp8",
    "quantize --model-dir {}/model --output-dir {}/out --qformat fp8 --calib-file @",
]


@pytest.mark.parametrize("path", ["/", "/dev/zero", "{}/" + "x" * 300, "{}/pipe"])
@pytest.mark.parametrize("words", COMMANDS)
def test_paths_that_are_none(words, path, place, within):
    os.mkfifo(place / "pipe")
    path = path.format(place)
    words = [path if word == "@" else word.format(place) for word in words.split()]
    assert within(*words).exit_code in (2, 3, 4, 6)
    assert not (place / "out").exists()


def test_names_that_are_not_utf_8(place):
    """A checkpoint of such a model, in such a directory, is read again."""
    model = os.fsdecode(os.fsencode(place) + b"/m\xff\xfe")
    output = os.fsdecode(os.fsencode(place) + b"/o\xff")
    shutil.copytree(place / "model", model)
    for words in (
        ("convert", "--model-dir", model, "--output-dir", output),
        ("inspect", "--check", output),
        ("inspect", output, "--json"),
        ("verify", output, "--model-dir", model, "--quick", "--json"),
    ):
        result = run_phireg(*words)
        assert result.exit_code in (0, 8), result.output
