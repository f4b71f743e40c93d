"""Kills, full disks, two runs at once: the original or the result, never a mix or nothing."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import grouped_by_hand as hand
import pytest
from grouped_by_hand import content, same

import phireg
from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion import stream
from phireg.errors import CheckError, OutputError, SourceError, UsageError
from phireg.source.model import Reader

pytestmark = pytest.mark.hostile("outputs")

ROOT = Path(__file__).parents[2]
VICTIM = Path(__file__).with_name("postprocess_victim.py")
RIGHT = hand.right()


def test_kill_9_everywhere(grouped, tmp_path):
    before = content(grouped)
    victim = subprocess.run(
        [sys.executable, VICTIM, grouped, tmp_path / "runs"],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert victim.returncode == 0, victim.stderr
    kills = int(victim.stdout)
    assert kills > 35
    missing = complete = 0
    for number in range(1, kills + 1):
        base = tmp_path / "runs" / str(number)
        directory, partial = base / "ckpt", base / "ckpt.phireg-partial"
        if not directory.exists():  # between the two renames the original is beside it
            missing += 1
            assert content(partial / "replaced") == before
            with pytest.raises(SourceError) as caught:
                phireg.row_order(directory)
            assert str(partial) in caught.value.hint
        elif content(directory) == before:
            if number % 9:
                continue
        else:
            complete += 1
            same(directory, RIGHT)
            assert phireg.inspect(directory, check=True).problems is not None
        # The next run finishes, or finds it finished; either way nothing is left over.
        try:
            phireg.postprocess(directory)
        except UsageError as refusal:
            assert "phireg.json" in refusal.message
        same(directory, RIGHT)
        assert {path.name for path in base.iterdir()} == {"ckpt"}
        assert set(content(directory)) == {*before, "phireg.json"}
    assert missing >= 1
    assert complete >= 3


@pytest.mark.parametrize("number", [1, 5, 12])
def test_full_disk(grouped, tmp_path, monkeypatch, number):
    before = content(grouped)
    pwrite, calls = os.pwrite, []

    def failing(descriptor, data, offset):
        calls.append(descriptor)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OutputError):
        phireg.postprocess(grouped)
    assert content(grouped) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_file_that_changes_meanwhile(grouped):
    before = content(grouped)
    path = grouped / "rank0.safetensors"

    def touch(more, total):
        os.utime(path, ns=(1, 1))

    with pytest.raises(SourceError, match="rank0"):
        phireg.postprocess(grouped, progress=touch)
    assert content(grouped) == before


def test_a_second_run_between_looking_and_writing(grouped, monkeypatch):
    """Rows are moved once: the first run writes what it looked at, or nothing."""
    first = RankFiles.__enter__
    calls = []

    def enter(self):
        if not calls:
            calls.append(1)
            phireg.postprocess(grouped)
        return first(self)

    monkeypatch.setattr(RankFiles, "__enter__", enter)
    with pytest.raises((CheckError, SourceError)):  # those files are not there any more
        phireg.postprocess(grouped)
    same(grouped, RIGHT)


def test_memory_is_bounded(tmp_path, grouped, monkeypatch):
    """The largest read is one block, however large a tensor is."""
    sizes = []
    read_into = Reader.read_into

    def recording(self, tensor, start, view):
        sizes.append(len(view))
        read_into(self, tensor, start, view)

    monkeypatch.setattr(stream, "BLOCK_BYTES", 512)
    monkeypatch.setattr(Reader, "read_into", recording)
    phireg.postprocess(grouped, tmp_path / "out")
    same(tmp_path / "out", RIGHT)
    assert 0 < max(sizes) <= 512
