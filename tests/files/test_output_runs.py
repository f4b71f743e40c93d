"""The output directory beside other runs, other users and what a killed run leaves."""

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from output_cases import (
    ROOT,
    VICTIM,
    content,
    convert,
    names,
    open_output,
    python,
    refused,
    tree,
)
from output_victim import NEW, OLD, fill, leave_stale

from phireg.errors import OutputError, UsageError

pytestmark = pytest.mark.hostile("outputs")


# --- leftovers, other people's directories and other runs ---------------------------------------


def test_empty_directories_in_the_way_are_taken_over(tmp_path):
    """The partial directory, and a target created anew after a killed run's first rename."""
    (tmp_path / "out.phireg-partial").mkdir()
    convert(tmp_path / "out", OLD)
    assert content(tmp_path / "out") == OLD
    shutil.rmtree(tmp_path / "out")
    leave_stale(tmp_path, unfinished=NEW, replaced=OLD)
    (tmp_path / "out").mkdir()
    refused(tmp_path / "out")
    assert content(tmp_path / "out") == OLD
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "files", [{"notes.txt": "mine"}, NEW, {"notes.txt": "mine", ".phireg-partial": "{}"}]
)
def test_partial_directory_of_someone_else_is_left_alone(tmp_path, files):
    fill(tmp_path / "out.phireg-partial", files)
    refused(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out.phireg-partial"]
    assert content(tmp_path / "out.phireg-partial").keys() == files.keys()


def test_file_and_link_in_place_of_the_partial_directory_are_left_alone(tmp_path):
    partial = tmp_path / "out.phireg-partial"
    partial.write_text("mine")
    refused(tmp_path / "out")
    assert partial.read_text() == "mine"
    partial.unlink()
    (tmp_path / "elsewhere").mkdir()
    partial.symlink_to("elsewhere")
    refused(tmp_path / "out")
    assert partial.is_symlink()
    assert tree(tmp_path / "elsewhere") == []
    # The same with a marker that is a link.
    partial.unlink()
    partial.mkdir()
    (tmp_path / "mine").write_text("mine")
    (partial / ".phireg-partial").symlink_to(tmp_path / "mine")
    refused(tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "mine"


def test_run_of_another_process_is_seen_and_its_death_too(tmp_path):
    code = """
import sys, time
from pathlib import Path
from phireg.files.output import OutputDirectory
with OutputDirectory(Path(sys.argv[1]), overwrite=False, required_bytes=0) as partial:
    (partial / "config.json").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    child = python(code, tmp_path / "out")
    assert child.stdout.readline() == "ready\n"
    for overwrite in (False, True):
        assert f"pid {child.pid}" in refused(tmp_path / "out", overwrite=overwrite)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "out")
    assert content(tmp_path / "out") == NEW
    assert names(tmp_path) == ["out"]


def test_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    refused(tmp_path / "out")
    monkeypatch.undo()
    convert(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_run_that_ends_between_our_open_and_our_lock(tmp_path, monkeypatch):
    flock = fcntl.flock

    def other_run_first(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        convert(tmp_path / "out", OLD)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", other_run_first)
    # The lock is of a deleted file then: start over, and find the other run's output.
    refused(tmp_path / "out")
    assert content(tmp_path / "out") == OLD
    assert names(tmp_path) == ["out"]


def test_directories_that_vanish_under_our_feet_are_recreated(tmp_path, monkeypatch):
    real_open = os.open

    def vanish_first(*arguments, **options):
        monkeypatch.setattr(os, "open", real_open)
        (tmp_path / "a/out.phireg-partial").rmdir()
        (tmp_path / "a").rmdir()
        return real_open(*arguments, **options)

    monkeypatch.setattr(os, "open", vanish_first)
    convert(tmp_path / "a/out")
    assert content(tmp_path / "a/out") == NEW


RACE = """
import os, sys, time
from pathlib import Path
from phireg.errors import OutputError, UsageError
from phireg.files.output import OutputDirectory
base, me, start = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
results = []
for number in range(40):
    while time.time() < start + number * 0.02:
        pass
    try:
        target = base / str(number) / "out"
        with OutputDirectory(target, overwrite=False, required_bytes=0) as partial:
            (partial / "config.json").write_text(me)
            time.sleep(0.004)
            assert (partial / "config.json").read_text() == me
        results.append("won")
    except OutputError as error:
        assert "is writing" in str(error) or "not empty" in str(error), error
        results.append("lost")
print(" ".join(results))
"""


def test_of_two_runs_that_start_at_once_one_wins(tmp_path):
    start = time.time() + 0.7
    children = [python(RACE, tmp_path, name, start) for name in "ab"]
    outputs = [child.communicate() for child in children]
    assert [errors for _, errors in outputs] == ["", ""]
    first, second = (output.split() for output, _ in outputs)
    assert len(first) == len(second) == 40
    for number, pair in enumerate(zip(first, second, strict=True)):
        assert sorted(pair) == ["lost", "won"], number
        winner = "ab"[pair.index("won")]
        assert content(tmp_path / str(number) / "out") == {"config.json": winner}
        assert names(tmp_path / str(number)) == ["out"]


# --- kill -9 at every step ----------------------------------------------------------------------

# What the target may be after a kill: None stands for absent.
SCENARIOS = {
    "fresh": [None, NEW],
    "empty": [{}, NEW],
    "overwrite": [OLD, None, NEW],
    "interrupted": [OLD],
    "stale": [None, NEW],
    "put-back": [None, OLD, NEW],
    "finish": [NEW, None],
}


def looks_finished(directory):
    """Anything with a config.json that is not inside a directory marked as partial."""
    return (directory / "config.json").exists() and not any(
        (parent / ".phireg-partial").exists() for parent in (directory, *directory.parents)
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_at_every_step(tmp_path, scenario):
    command = [sys.executable, str(VICTIM), scenario, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    victim = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert victim.returncode == 0, victim.stderr
    kills = int(victim.stdout)
    # Lock, marker, three files, their fsync, rename, removal: fewer kills would test nothing.
    assert kills >= 20
    seen = []
    for number in range(1, kills + 2):
        base = tmp_path / str(number)
        out = base / "out"
        result = content(out) if out.exists() else None
        seen.append(result)
        assert result in SCENARIOS[scenario], number
        assert set(names(base)) <= {"out", "out.phireg-partial"}, number
        if result is None and scenario in ("overwrite", "put-back", "finish"):
            # Between the two renames: nothing is lost.
            replaced = base / "out.phireg-partial/replaced"
            assert content(replaced) == (NEW if scenario == "finish" else OLD), number
            assert content(base / "out.phireg-partial/unfinished") == NEW, number
        finished = [path for path in base.rglob("*") if path.is_dir() and looks_finished(path)]
        assert finished == ([out] if result else []), number

        # Even a run that is refused afterwards puts the directory in order ...
        try:
            convert(out)
        except OutputError as error:
            assert "exists and is not empty" in error.message, number
        assert content(out) in (OLD, NEW), number
        assert names(base) == ["out"], number
        # ... and the next one with --overwrite succeeds.
        convert(out, NEW | {"phireg.json": "{}"}, overwrite=True)
        assert content(out) == NEW | {"phireg.json": "{}"}, number
        assert names(base) == ["out"], number
    for possible in SCENARIOS[scenario]:
        assert possible in seen, "a moment that no kill met"
    assert seen[-1] == (OLD if scenario == "interrupted" else NEW)


# Other users


def test_the_partial_directory_is_closed_to_others_and_the_output_is_not(tmp_path):
    before = os.umask(0o002)
    try:
        with open_output(tmp_path / "out") as partial:
            fill(partial, NEW)
            assert stat.S_IMODE(partial.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o775
    assert stat.S_IMODE((tmp_path / "out/rank0.safetensors").stat().st_mode) == 0o664


@pytest.mark.parametrize("kind", ["owner", "mode"])
def test_a_partial_directory_of_others_is_not_taken_over(tmp_path, monkeypatch, kind):
    """It would be published with what they have put, or will put, inside."""
    partial = tmp_path / "out.phireg-partial"
    (partial / "unfinished").mkdir(parents=True)
    (partial / ".phireg-partial").touch()
    (partial / "unfinished/theirs").touch()
    if kind == "mode":
        partial.chmod(0o777)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: partial.stat().st_uid + 1)
    refused(tmp_path / "out")
    assert names(tmp_path) == ["out.phireg-partial"]
    assert (partial / "unfinished/theirs").exists()


def test_an_empty_partial_directory_of_others_stays(tmp_path):
    (tmp_path / "out.phireg-partial").mkdir()
    (tmp_path / "out.phireg-partial").chmod(0o777)
    refused(tmp_path / "out")
    assert names(tmp_path) == ["out.phireg-partial"]


def test_an_exchanged_directory_is_not_published(tmp_path):
    with pytest.raises(OutputError), open_output(tmp_path / "out") as partial:
        fill(partial, NEW)
        partial.parent.rename(tmp_path / "moved")
        (tmp_path / "out.phireg-partial/unfinished").mkdir(parents=True)
        (tmp_path / "out.phireg-partial/unfinished/rank0.safetensors").write_text("theirs")
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_too_long_is_wrong_usage(tmp_path):
    for target in (tmp_path / ("a" * 300), tmp_path / "parent" / ("n" * 250)):
        with pytest.raises(UsageError), open_output(target):
            pass
        assert list(tmp_path.iterdir()) == []
