import errno
import fcntl
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest
from output_victim import NEW, OLD, fill, leave_stale

from phireg.errors import OutputError, UsageError
from phireg.files.output import OutputDirectory
from phireg.files.writing import REASONS

pytestmark = pytest.mark.hostile("outputs")

ROOT = Path(__file__).parents[2]
VICTIM = Path(__file__).with_name("output_victim.py")
Usage = namedtuple("Usage", "total used free")


def content(directory):
    """File name -> text of a flat directory."""
    return {path.name: path.read_text() for path in directory.iterdir()}


def names(directory):
    return [path.name for path in directory.iterdir()]


def tree(base):
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


def open_output(target, *, overwrite=False, required_bytes=0):
    return OutputDirectory(target, overwrite=overwrite, required_bytes=required_bytes)


def convert(target, files=NEW, *, overwrite=False):
    with open_output(target, overwrite=overwrite) as partial:
        fill(partial, files)


def refused(*args, **options):
    """Check that an output is refused with a reason, and return that."""
    with pytest.raises(OutputError) as caught:
        convert(*args, **options)
    return str(caught.value)


def python(code, *arguments, **options):
    """Start another Python with phireg importable; its output comes as text."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# --- publishing -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["out", "empty", "a/b/out"])
def test_target_appears_complete_and_alone(tmp_path, target):
    if target == "empty":
        (tmp_path / "empty").mkdir()
    target = tmp_path / target
    with open_output(target) as partial:
        fill(partial, NEW)
        assert not (target / "config.json").exists()
        # A sibling: on the same file system, so that the rename is atomic.
        assert partial.relative_to(target.parent).parts[0] == f"{target.name}.phireg-partial"
    assert content(target) == NEW
    assert names(target.parent) == [target.name]


def test_relative_target_and_a_later_chdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with open_output(Path("out")) as partial:
        os.chdir("elsewhere")
        fill(partial, NEW)
    assert content(tmp_path / "out") == NEW


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        convert(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_every_file_is_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def record_rename(source, target, **options):
        rename(source, target, **options)
        events.append(("rename", target))

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    with open_output(tmp_path / "new/out") as partial:
        fill(partial, NEW)
        fill(partial / "sub", {"deep": "x"})
    published = events.index(("rename", tmp_path / "new/out"))
    before = {inode for what, inode in events[:published] if what == "fsync"}
    after = {inode for what, inode in events[published:] if what == "fsync"}
    out = tmp_path / "new/out"
    for path in (out, *out.rglob("*")):
        assert path.stat().st_ino in before, path
    # The created parent has its own entry to make durable.
    assert {(tmp_path / "new").stat().st_ino, tmp_path.stat().st_ino} <= after


def test_sync_may_be_absent_for_directories_but_not_fail_for_files(tmp_path, monkeypatch):
    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    broken = True
    refused(tmp_path / "out")
    assert tree(tmp_path) == []
    broken = False
    convert(tmp_path / "out")
    assert content(tmp_path / "out") == NEW


# --- targets that are refused -----------------------------------------------------------------


@pytest.mark.parametrize(("files", "overwrite"), [(OLD, False), ({"notes.txt": "mine"}, True)])
def test_existing_output_is_refused_before_the_work_and_kept(tmp_path, files, overwrite):
    fill(tmp_path / "out", files)
    with pytest.raises(OutputError), open_output(tmp_path / "out", overwrite=overwrite):
        pytest.fail("started")
    assert content(tmp_path / "out") == files
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("below", ["", "out", "deeper/out"])
def test_file_as_target_or_parent_is_refused(tmp_path, below, overwrite):
    (tmp_path / "file").write_text("mine")
    assert "file" in refused(tmp_path / "file" / below, overwrite=overwrite)
    assert content(tmp_path) == {"file": "mine"}


def test_where_nothing_can_be_created_the_reason_is_given(tmp_path, monkeypatch):
    """As in /proc, whose directories are there and take nothing."""

    def absent(path, *more, **options):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(Path, "mkdir", absent)
    assert os.strerror(errno.ENOENT) in refused(tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["", ".", "/", "..", "a/..", "../..", "x.phireg-partial", "x.phireg-partial/out"],
)
def test_names_that_cannot_be_created(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(Path(name))
    assert tree(tmp_path) == []


@pytest.mark.parametrize("target", ["/", "out", "disk"])
def test_links_to_themselves_to_the_root_and_to_mount_points_are_refused(
    tmp_path, monkeypatch, target
):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path in (Path("/"), tmp_path / "disk"))
    (tmp_path / "out").symlink_to(target)
    for overwrite in (False, True):
        refused(tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path) == ["disk", "out"]


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from phireg.errors import OutputError
from phireg.files.output import OutputDirectory
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with OutputDirectory(Path(sys.argv[1]), overwrite=True, required_bytes=0):
        pass
except OutputError as error:
    print(error)
"""


@pytest.fixture
def open_path():
    """A directory that every user can reach; tmp_path is only the owner's."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for directory in path.rglob("*"):
        directory.chmod(0o755)
    shutil.rmtree(path)


@pytest.mark.parametrize(("modes", "named"), [((0o555, 0o777), "partial"), ((0o777, 0o555), "out")])
def test_directories_without_write_permission_are_refused_and_kept(open_path, modes, named):
    parent = open_path / "parent"
    fill(parent / "out", OLD)
    for directory, mode in zip((parent, parent / "out"), modes, strict=True):
        directory.chmod(mode)
    output, errors = python(UNPRIVILEGED, parent / "out", cwd="/").communicate()
    assert errors == ""
    assert "permission" in output and named in output
    assert content(parent / "out") == OLD
    assert names(parent) == ["out"]


# --- overwrite --------------------------------------------------------------------------------


def test_overwrite_replaces_a_checkpoint_only_when_the_new_one_is_complete(tmp_path):
    known = ["quant_cfg.json", "phireg.json", "rank1.safetensors", "rank12.safetensors"]
    known += ["tokenizer.json", "cl100k_base.tiktoken", "generation_config.json"]
    former = OLD | dict.fromkeys(known, "x")
    fill(tmp_path / "out", former)
    with open_output(tmp_path / "out", overwrite=True) as partial:
        fill(partial, NEW)
        assert content(tmp_path / "out") == former
    assert content(tmp_path / "out") == NEW
    assert names(tmp_path) == ["out"]


HF_MODEL = {"config.json": '{"architectures": ["X"]}', "model.safetensors": ""}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (OLD | {"rank0.engine": "mine"}, "rank0.engine"),
        (OLD | {"rank.safetensors": "mine"}, "rank.safetensors"),
        (OLD | {"rank0.safetensors.bak": "mine"}, "rank0.safetensors.bak"),
        ({"config.json": '{"architecture": "X"}'}, "rank0.safetensors"),
        ({"rank0.safetensors": ""}, "config.json"),
        ({"rank0.safetensors": "", "config.json": "{"}, "config.json"),
        ({"rank0.safetensors": "", "config.json": "[" * 100_000}, "config.json"),
        ({"rank0.safetensors": "", "config.json": '["architecture"]'}, "config.json"),
        ({"rank0.safetensors": "", "config.json": '{"architecture": 1}'}, "config.json"),
        (HF_MODEL, "model.safetensors"),
    ],
)
def test_overwrite_refuses_what_is_not_a_checkpoint_and_nothing_else(tmp_path, files, named):
    fill(tmp_path / "out", files)
    assert named in refused(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == files
    assert names(tmp_path) == ["out"]


def test_overwrite_refuses_subdirectories_and_links(tmp_path):
    fill(tmp_path / "out", OLD)
    fill(tmp_path / "out/tokenizer.json", {"mine": "x"})
    assert "tokenizer.json" in refused(tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "out/tokenizer.json")
    (tmp_path / "out/tokenizer.json").symlink_to("config.json")
    assert "tokenizer.json" in refused(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_target_that_changes_while_writing_is_kept(tmp_path, overwrite):
    if overwrite:
        fill(tmp_path / "out", OLD)
    with pytest.raises(OutputError), open_output(tmp_path / "out", overwrite=overwrite) as partial:
        fill(partial, NEW)
        fill(tmp_path / "out", OLD | {"rank0.engine": "mine"})
    assert content(tmp_path / "out") == OLD | {"rank0.engine": "mine"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("missing", [False, True])
def test_link_is_followed_and_stays(tmp_path, missing):
    if not missing:
        fill(tmp_path / "disk/real", OLD)
    (tmp_path / "out").symlink_to("disk/real")
    convert(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").readlink() == Path("disk/real")
    assert content(tmp_path / "disk/real") == NEW
    assert names(tmp_path / "disk") == ["real"]


@pytest.mark.parametrize("failing", [1, 2])
def test_failing_rename_puts_the_old_one_back(tmp_path, monkeypatch, failing):
    fill(tmp_path / "out", OLD)
    rename, calls = os.rename, itertools.count(1)

    def rename_once_fails(source, target, **options):
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", rename_once_fails)
    refused(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == OLD
    assert names(tmp_path) == ["out"]


def test_target_taken_between_the_renames_loses_neither(tmp_path, monkeypatch):
    fill(tmp_path / "out", OLD)
    rename = os.rename

    def rename_and_intrude(source, target, **options):
        rename(source, target, **options)
        if source == tmp_path / "out":
            fill(tmp_path / "out", {"notes.txt": "mine"})

    monkeypatch.setattr(os, "rename", rename_and_intrude)
    with pytest.raises(OutputError) as caught:
        convert(tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    replaced = tmp_path / "out.phireg-partial/replaced"
    assert str(replaced) in caught.value.message
    assert content(tmp_path / "out") == {"notes.txt": "mine"}
    assert content(replaced) == OLD
    refused(tmp_path / "out", overwrite=True)
    assert content(replaced) == OLD
    shutil.rmtree(tmp_path / "out")
    refused(tmp_path / "out")
    assert content(tmp_path / "out") == OLD
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("halfway", [False, True])
def test_replaced_output_that_cannot_be_removed_is_never_put_back(tmp_path, monkeypatch, halfway):
    fill(tmp_path / "out", OLD)

    def broken(directory, *_):
        if halfway:
            (directory / "rank0.safetensors").unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shutil, "rmtree", broken)
    refused(tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert content(tmp_path / "out") == NEW
    shutil.rmtree(tmp_path / "out")
    convert(tmp_path / "out")
    assert content(tmp_path / "out") == NEW
    assert names(tmp_path) == ["out"]


# --- failures in the block --------------------------------------------------------------------


NO_ACCESS = [
    PermissionError(errno.EACCES, "Permission denied", name)
    for name in ("/src/model.safetensors", b"model.safetensors", "out")
]


@pytest.mark.parametrize(
    "error",
    [ValueError(), FileNotFoundError("stop"), KeyboardInterrupt(), OutputError("stop"), *NO_ACCESS],
)
def test_other_exceptions_pass_unchanged_and_leave_nothing(tmp_path, monkeypatch, error):
    """Those of the block itself, and of other files than the output's."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(type(error)) as caught, open_output(tmp_path / "a/b/out") as partial:
        fill(partial, NEW)
        raise error
    assert caught.value is error
    assert tree(tmp_path) == []


def test_existing_parents_and_other_peoples_files_stay(tmp_path):
    fill(tmp_path / "a", {})
    with pytest.raises(ValueError), open_output(tmp_path / "a/b/out"):
        (tmp_path / "a/b/mine").write_text("x")
        raise ValueError
    assert tree(tmp_path) == ["a", "a/b", "a/b/mine"]


@pytest.mark.parametrize(
    ("number", "named"), [*((number, False) for number in REASONS), (errno.EACCES, True)]
)
def test_write_errors_become_output_errors(tmp_path, number, named):
    with pytest.raises(OutputError) as caught, open_output(tmp_path / "out") as partial:
        fill(partial, NEW)
        name = [str(partial / "rank0.safetensors")] if named else []
        raise OSError(number, os.strerror(number), *name)
    assert REASONS[number] in caught.value.message
    assert str(tmp_path / "out") in caught.value.message
    assert tree(tmp_path) == []


# --- disk space -------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch, overwrite):
    """The output to be replaced does not count as free: it stays until the end."""
    if overwrite:
        fill(tmp_path / "out", OLD)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**50, 0, 2**30))
    target = tmp_path / ("out" if overwrite else "a/out")
    for required_bytes in (2**31, 2**30 - 2**20):  # the second one leaves no margin
        with (
            pytest.raises(OutputError),
            open_output(target, overwrite=overwrite, required_bytes=required_bytes),
        ):
            pytest.fail("started")
    assert tree(tmp_path) == (["out", *(f"out/{name}" for name in OLD)] if overwrite else [])
    with open_output(target, overwrite=overwrite, required_bytes=2**30 - 2**26):
        pass


def test_leftovers_are_removed_before_space_is_checked(tmp_path, monkeypatch):
    stale = leave_stale(tmp_path, unfinished=NEW)

    def usage(_):
        return Usage(2**50, 0, 0 if (stale / "unfinished").exists() else 2**30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with open_output(tmp_path / "out", required_bytes=2**20) as partial:
        fill(partial, NEW)
    assert content(tmp_path / "out") == NEW


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
