"""The corpus, and the fuzzer: an error of phireg's own or success, in bounds, without output."""

import importlib.util
from pathlib import Path

import pytest
from helpers.bounds import bounded
from helpers.hostile_readers import READERS, BrokenError, Reader, check, models

pytestmark = pytest.mark.hostile("fuzzing: corpus")

HERE = Path(__file__).parent
CORPUS = sorted(path for name in READERS for path in (HERE / "corpus" / name).glob("*"))
SECONDS = 20

FEWEST = 20  # inputs of a reader: two cores serve all of them, and each imports torch first


def fuzzer():
    spec = importlib.util.spec_from_file_location("fuzz", HERE / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = models(tmp_path_factory.mktemp("fuzzed"))
    return root, {name: (root / reader.file).read_bytes() for name, reader in READERS.items()}


@pytest.mark.parametrize("name", READERS)
def test_the_good_file_is_taken(name, made):
    root, good = made
    reader = READERS[name]
    assert check(reader, root, good[name], reader.part(good[name]))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_corpus(path, made):
    root, good = made
    name = path.parent.name
    try:
        with bounded(20):
            check(READERS[name], root, good[name], path.read_bytes())
    finally:
        (root / READERS[name].file).write_bytes(good[name])


def broken(read):
    return Reader("file", read)


@pytest.mark.parametrize(
    "read",
    [
        lambda root: print("text"),
        lambda root: (root / "left").touch(),
        lambda root: {}["key"],
    ],
    ids=["prints", "writes", "raises"],
)
def test_the_check_sees(read, tmp_path):
    with pytest.raises((BrokenError, KeyError)):
        check(broken(read), tmp_path, b"", b"x")


@pytest.mark.slow
def test_every_reader_is_fuzzed(tmp_path):
    """All at the same time, for a minute."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python or platform")
    fuzz = fuzzer()
    running = {name: fuzz.start(name, SECONDS, tmp_path) for name in READERS}
    outputs = {name: process.communicate()[0] for name, process in running.items()}
    failed = {name: outputs[name][-2000:] for name, p in running.items() if p.returncode}
    assert not failed, failed
    few = {n: c for n, o in outputs.items() if (c := fuzz.tried(o)) < FEWEST}
    assert not few


@pytest.mark.slow
def test_the_fuzzer_finds_what_is_broken(tmp_path):
    pytest.importorskip("atheris")
    process = fuzzer().start("planted", SECONDS, tmp_path)
    output = process.communicate()[0]
    assert process.returncode != 0, output[-2000:]
    assert "KeyError: 'planted'" in output
    assert any(path.name.startswith("planted-crash") for path in tmp_path.iterdir())
