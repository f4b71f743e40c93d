"""A source, its checkpoint and an engine's directory, to be spoiled; commands within bounds."""

import json
import shutil

import pytest
from helpers.bounds import bounded
from helpers.command_line import run_phireg
from helpers.tiny_phi3 import make_tiny_phi3
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

MOST_OUTPUT = 20_000
"""Characters that a command may print, whatever it is given."""


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    make_tiny_phi3(root / "model")
    words = Tokenizer(WordLevel({"?": 0, "a": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / "model")
    result = run_phireg("convert", "--model-dir", root / "model", "--output-dir", root / "ckpt")
    assert result.exit_code == 0, result.output
    (root / "engine").mkdir()
    config = json.loads((root / "ckpt/config.json").read_text())
    build = {"max_batch_size": 1, "max_input_len": 8, "max_seq_len": 16, "max_beam_width": 1}
    engine = {"version": "0.17.0", "pretrained_config": config, "build_config": build}
    (root / "engine/config.json").write_text(json.dumps(engine))
    (root / "engine/rank0.engine").write_bytes(b"engine")
    return root


@pytest.fixture
def place(originals, tmp_path):
    """A directory with copies: ``model``, ``ckpt``, ``engine``."""
    shutil.copytree(originals, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def within():
    """Run a command within bounds of time, memory and output: no defect, no traceback."""

    def run(*words, seconds=20, most=MOST_OUTPUT):
        with bounded(seconds):
            result = run_phireg(*words)
        assert result.exit_code != 1, result.output[:2000]
        assert "internal error" not in result.output
        assert "Traceback" not in result.output
        assert len(result.output) < most
        return result

    return run


@pytest.fixture
def refused(within):
    """Run a command that must refuse its input; ``named`` is what the error names."""

    def run(*words, codes=(2, 3, 4), named=""):
        result = within(*words)
        assert result.exit_code in codes, result.output[:2000]
        assert named in result.output, result.output[:2000]
        return result.output

    return run
