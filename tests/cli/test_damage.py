"""Every damaged source ends in a documented error, without traceback or output."""

import errno
import os

import pytest
from helpers.damage import DAMAGES, config, drop_config

# One of each kind; tests/source/test_damaged_sources.py has them all.
KINDS = [
    "shard-cut-by-one-byte",
    "index-name-leaves",
    "bin-malicious",
    "config-not-json",
    "lora-adapter",
    "tensor-missing",
]
damages = pytest.mark.parametrize(
    "damage", [pytest.param(d, id=d.name) for d in DAMAGES if d.name in KINDS]
)


@pytest.mark.parametrize(
    "change",
    [drop_config("architectures"), config(architectures=[]), drop_config("rms_norm_eps")],
    ids=["architectures-missing", "architectures-empty", "eps-missing"],
)
def test_what_transformers_accepts_is_converted_alike(change, tiny, run):
    """The model_type decides, and rms_norm_eps is 1e-5 by default."""
    assert run("convert", "--model-dir", tiny, "--output-dir", tiny.parent / "a").exit_code == 0
    change(tiny)
    result = run("convert", "--model-dir", tiny, "--output-dir", tiny.parent / "b")
    assert result.exit_code == 0, result.output
    for name in ("config.json", "rank0.safetensors"):
        assert (tiny.parent / "a" / name).read_bytes() == (tiny.parent / "b" / name).read_bytes()


@damages
def test_damage_is_refused(damage, tiny, run):
    damage.apply(tiny)
    before = sorted(path.name for path in tiny.iterdir())
    output_dir = tiny.parent / "new" / "out"
    for command in (["plan"], ["convert", "--output-dir", output_dir]):
        result = run(*command, "--model-dir", tiny)
        assert result.exit_code == 3, result.output
        assert result.output.startswith("error: ") or command == ["plan"], result.output
        assert damage.named in result.output
        assert "Traceback" not in result.output
    assert [path.name for path in tiny.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in tiny.iterdir()) == before


def test_a_source_that_shrinks_while_it_is_read(tiny, run, monkeypatch):
    from phireg.conversion import convert as module

    stream = module.stream

    def cut_first(*args, **options):
        shard = sorted(tiny.glob("*.safetensors"))[1]
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)
        return stream(*args, **options)

    monkeypatch.setattr(module, "stream", cut_first)
    result = run("convert", "--model-dir", tiny, "--output-dir", tiny.parent / "out")
    assert result.exit_code == 3
    assert "model-00002-of-00003.safetensors" in result.output
    assert [path.name for path in tiny.parent.iterdir()] == ["model"]


def test_a_tokenizer_file_that_cannot_be_read(tiny, run, monkeypatch):
    (tiny / "tokenizer.json").write_text("{}")

    opened = os.open

    def denied(path, *more, **options):
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "open", denied)
    result = run("convert", "--model-dir", tiny, "--output-dir", tiny.parent / "out")
    assert result.exit_code == 3
    assert "tokenizer.json" in result.output
    assert [path.name for path in tiny.parent.iterdir()] == ["model"]
