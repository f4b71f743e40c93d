"""Single files: new ones or phireg's own, complete or not at all, never through a link."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from phireg.errors import OutputError
from phireg.files.writing import (
    LOG,
    REPORT,
    STATISTICS,
    check_writable,
    copy_file,
    new_log,
    write_file,
)

pytestmark = pytest.mark.hostile("outputs")

PAGE = b"<!doctype html>" + REPORT.mark


def write_log(path, content, kind):
    with new_log(path) as log:
        log.write(content)


WRITERS = [(write_file, REPORT), (write_file, STATISTICS), (write_log, LOG)]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("write", "kind"), WRITERS, ids=lambda value: getattr(value, "name", ""))
class TestEveryKind:
    def test_new_empty_and_own_files_are_written(self, write, kind, tmp_path):
        path = tmp_path / "file"
        path.touch()  # as mktemp makes it
        for number in (1, 2):
            check_writable(path, kind)
            write(path, kind.mark + b"%d" % number, kind)
            assert path.read_bytes().endswith(b"%d" % number)
        assert names(tmp_path) == ["file"]

    @pytest.mark.parametrize("make", ["file", "link", "dangling", "fifo", "directory", "device"])
    def test_nothing_else_is_touched(self, write, kind, tmp_path, make):
        path, other = tmp_path / "file", tmp_path / "other"
        other.write_bytes(b'{"model_type": "phi3"}')
        if make == "file":
            path.write_bytes(other.read_bytes())
        elif make == "link":
            other.write_bytes(kind.mark)  # even phireg's own file is not reached through a link
            path.symlink_to(other)
        elif make == "dangling":
            path.symlink_to(tmp_path / "nowhere")
        elif make == "fifo":
            os.mkfifo(path)
        elif make == "directory":
            path.mkdir()
        else:
            path = tmp_path / ".." / "null"
            if not hasattr(os, "mknod") or os.geteuid():
                pytest.skip("only root makes devices")
            path = tmp_path / "file"
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        before = path.lstat(), other.read_bytes(), names(tmp_path)
        for attempt in (lambda: check_writable(path, kind), lambda: write(path, b"new", kind)):
            with pytest.raises(OutputError, match="file") as caught:
                attempt()
            assert "phi3" not in caught.value.message
        assert (path.lstat(), other.read_bytes(), names(tmp_path)) == before

    def test_the_umask_holds(self, write, kind, tmp_path):
        before = os.umask(0o027)
        try:
            write(tmp_path / "file", b"", kind)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_copies_follow_the_umask(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").write_bytes(b"x")
    (tmp_path / "from" / "file").chmod(0o4777)
    before = os.umask(0o077)
    try:
        copy = copy_file(tmp_path / "from" / "file", tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


VICTIM = """
import os, resource, signal, sys
from pathlib import Path
from phireg.files.writing import REPORT, write_file
path, how = Path(sys.argv[1]), sys.argv[2]
if how == "kill":
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
elif how == "interrupt":
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGINT)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_file(path, REPORT.mark * 1000, REPORT)
"""


@pytest.mark.parametrize("how", ["kill", "interrupt", "full"])
def test_failures_leave_nothing_half_written(how, tmp_path):
    path = tmp_path / "report.html"
    path.write_bytes(PAGE)
    done = subprocess.run([sys.executable, "-c", VICTIM, path, how], capture_output=True)
    assert done.returncode != 0
    assert path.read_bytes() == PAGE
    if how == "kill":
        assert done.returncode == -signal.SIGKILL
        assert len(names(tmp_path)) == 2
        write_file(path, PAGE + b"2", REPORT)  # the next run removes what is left
    assert names(tmp_path) == ["report.html"]


def test_the_unfinished_file_of_a_run_that_lives_stays(tmp_path):
    import fcntl

    other = tmp_path / ".report.html.1.phireg-partial"
    with other.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_file(tmp_path / "report.html", PAGE, REPORT)
        assert other.exists()
    write_file(tmp_path / "report.html", PAGE, REPORT)
    assert not other.exists()
