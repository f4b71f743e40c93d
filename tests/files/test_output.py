"""The output directory: publishing, refusing, overwriting, failing."""

import errno
import itertools
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from output_cases import (
    Usage,
    content,
    convert,
    names,
    open_output,
    python,
    refused,
    tree,
)
from output_victim import NEW, OLD, fill, leave_stale

from phireg.errors import OutputError
from phireg.files.writing import REASONS

pytestmark = pytest.mark.hostile("outputs")


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
