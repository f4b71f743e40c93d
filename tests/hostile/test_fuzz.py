"""The corpus, and the fuzzer: an error of phireg's own or success, in bounds, without output."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.bounds import bounded
from helpers.hostile_readers import READERS, BrokenError, Reader, check, models

pytestmark = pytest.mark.hostile("fuzzing: corpus")

HERE = Path(__file__).parent
CORPUS = sorted(path for name in READERS for path in (HERE / "corpus" / name).glob("*"))
SECONDS = 20
FEWEST = 20  # inputs of a reader on a busy machine


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
def test_every_reader_is_fuzzed_and_a_broken_one_is_found(tmp_path):
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python or platform")
    command = [sys.executable, HERE / "fuzz.py", SECONDS, *READERS, "planted", "--keep", tmp_path]
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    results = re.findall(r"^(\S+) +([\d,]+) inputs, exit code (-?\d+)$", done.stdout, re.MULTILINE)
    tried = {name: int(count.replace(",", "")) for name, count, _ in results}
    failed = [name for name, _, code in results if code != "0"]
    assert failed == ["planted"], done.stdout + done.stderr
    assert "KeyError: 'planted'" in done.stdout
    assert {path.name.partition("-crash")[0] for path in tmp_path.iterdir()} == {"planted"}
    assert {name for name in READERS if tried[name] >= FEWEST} == set(READERS), tried
