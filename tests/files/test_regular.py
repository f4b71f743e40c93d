"""What the opener opens, and what it refuses."""

import os
from pathlib import Path

import pytest

from phireg.errors import SourceError, UsageError
from phireg.files.kinds import check_loadable, tokenizer_files
from phireg.files.regular import ANYWHERE, open_regular, read_file, read_named

pytestmark = pytest.mark.hostile("files that are none")


def text(path: Path, content: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_links_inside_the_directory_are_followed(tmp_path):
    text(tmp_path / "deep/file")
    (tmp_path / "link").symlink_to("deep/file")
    assert read_file(tmp_path / "link", 4) == b"text"
    (tmp_path / "whole").symlink_to("deep")
    assert read_file(tmp_path / "whole/file", 4) == b"text"


@pytest.mark.parametrize("target", ["../secret", "{}/secret", "link/../secret"])
def test_links_to_elsewhere_are_refused(target, tmp_path):
    text(tmp_path / "secret")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "file").symlink_to(target.format(tmp_path))
    (directory / "link").symlink_to(".")
    with pytest.raises(SourceError, match="file"):
        open_regular(directory / "file")
    assert read_file(directory / "file", 4, inside=ANYWHERE) == b"text"


def test_a_directory_that_links_elsewhere_is_refused(tmp_path):
    text(tmp_path / "other/model.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/part").symlink_to("../other")
    with pytest.raises(SourceError, match="outside"):
        open_regular(tmp_path / "model/part/model.safetensors", inside=tmp_path / "model")


@pytest.mark.parametrize(
    ("blob", "link", "opens"),
    [
        ("models--o--n/blobs/12", "models--o--n/snapshots/34/file", True),
        ("cache/blobs/12", "cache/snapshots/34/file", True),
        ("models--o--n/blobs/12", "local/file", True),  # a copy that an older hub library made
        ("other/blobs/12", "cache/snapshots/34/file", False),
        ("cache/refs/12", "cache/snapshots/34/file", False),
        ("cache/blobs/12", "local/file", False),
    ],
)
def test_links_into_the_cache_of_the_hub(blob, link, opens, tmp_path):
    text(tmp_path / blob)
    (tmp_path / link).parent.mkdir(parents=True)
    (tmp_path / link).symlink_to(tmp_path / blob)
    if opens:
        assert read_file(tmp_path / link, 4) == b"text"
    else:
        with pytest.raises(SourceError, match="outside"):
            open_regular(tmp_path / link)


def test_the_size_is_bounded(tmp_path):
    path = text(tmp_path / "file", "12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(SourceError, match="5 bytes"):
        read_file(path, 4)


def test_a_named_file_that_cannot_be_read_is_a_usage_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "none", "n\0l", "x" * 300):
        with pytest.raises(UsageError):
            read_named(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "any.tiktoken", "chat_template.jinja"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_files_that_travel_are_files(name, make, tmp_path):
    make(tmp_path / name)
    with pytest.raises(SourceError, match=name):
        tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.4.0.json", "chat_template.json", "chat_templates/x.jinja"]
)
def test_a_library_meets_no_pipe(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match=Path(name).name):
        check_loadable(tmp_path)


def test_no_descriptor_stays_open(tmp_path):
    text(tmp_path / "file")
    count = len(list(Path("/proc/self/fd").iterdir()))
    read_file(tmp_path / "file", 9)
    for wrong in (lambda: read_file(tmp_path / "file", 1), lambda: open_regular(tmp_path)):
        with pytest.raises(SourceError):
            wrong()
    assert len(list(Path("/proc/self/fd").iterdir())) == count
