"""No network here: the hub is faked, except that its real client is asked while offline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import utils

from phireg.errors import SourceError, UsageError
from phireg.source.hub import resolve_model_dir

REPO = "microsoft/Phi-3-mini-4k-instruct"
COMMIT = "0a67737cc96d2554230f90338b163bc6380a2a85"
FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "cl100k_base.tiktoken", "chat_template.jinja", "README.md",
]  # fmt: skip
OTHER = ["modeling_phi3.py", "configuration_phi3.py", "NOTICE.md", "a.gguf"]


class FakeHub:
    """Selects files as snapshot_download does, with the client's own filter."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.folder = root / "snapshots" / COMMIT
        self.files = files
        self.calls: list[tuple[str, str | None]] = []

    def __call__(self, repo_id, *, revision=None, allow_patterns, ignore_patterns):
        self.calls.append((repo_id, revision))
        for name in utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        return str(self.folder)

    def downloaded(self) -> set[str]:
        return {p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def install(files):
        fake = FakeHub(tmp_path / "hub", files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake

    monkeypatch.chdir(tmp_path)
    return install


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIN = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]


def test_only_data_files_are_downloaded(hub):
    weights = [*SHARDS, "model.safetensors.index.json"]
    fake = hub([*FILES, *weights, *OTHER, *BIN, "onnx/model.safetensors", "sub/config.json"])
    assert resolve_model_dir(REPO, "main") == (fake.folder, COMMIT)
    assert fake.downloaded() == {*FILES, *weights}
    assert fake.calls == [(REPO, "main")]


def test_bin_weights_only_where_there_are_no_safetensors(hub):
    fake = hub([*FILES, *OTHER, *BIN, "training_args.bin"])
    assert resolve_model_dir(REPO, None) == (fake.folder, COMMIT)
    assert fake.downloaded() == {*FILES, *BIN}


def test_a_local_directory_wins_and_has_no_revision(hub, tmp_path, monkeypatch):
    fake = hub(FILES)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    (tmp_path / REPO).mkdir(parents=True)
    assert resolve_model_dir(REPO, None) == (Path(REPO), None)
    for name in (str(tmp_path), f"~/{tmp_path.name}"):
        assert resolve_model_dir(name, None) == (tmp_path, None)
    assert not fake.calls
    with pytest.raises(UsageError):
        resolve_model_dir(str(tmp_path), "main")


@pytest.mark.parametrize(
    "name",
    ["/no/such", "./no", "../no/such", "~/no/such", "~nobody-here/x", "no", "a/b/c", "", "a\0/b",
     "owner/", "x" * 5000, "owner/na me", "owner/../x", ".owner/x"],
)  # fmt: skip
def test_impossible_names_are_not_looked_up(hub, name):
    fake = hub(FILES)
    with pytest.raises(SourceError):
        resolve_model_dir(name, None)
    assert not fake.calls


def http_error(kind: type[Exception]) -> Exception:
    """The client's error classes, without the response that their constructors ask for."""

    class Fake(kind):
        def __init__(self) -> None:
            Exception.__init__(self, "the first line\nand a traceback-like second one")

    return Fake()


HTTP_ERRORS = (
    *(utils.RepositoryNotFoundError, utils.GatedRepoError, utils.RevisionNotFoundError),
    *(utils.LocalEntryNotFoundError, utils.OfflineModeIsEnabled, utils.HfHubHTTPError),
)
OTHER_ERRORS = (OSError(28, "No space left on device"), ConnectionError(), ValueError("bad id"))


@pytest.mark.parametrize("error", [*map(http_error, HTTP_ERRORS), *OTHER_ERRORS])
def test_errors_of_the_hub_become_source_errors(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError) as caught:
        resolve_model_dir(REPO, "v9")
    assert REPO in caught.value.message
    assert caught.value.hint
    assert "second one" not in str(caught.value)


def run_offline(cache: Path, revision: str | None) -> str:
    code = (
        "import sys\n"
        "from phireg.source.hub import resolve_model_dir\n"
        "from phireg.errors import SourceError\n"
        "try:\n"
        "    print(*resolve_model_dir(sys.argv[1], sys.argv[2] or None))\n"
        "except SourceError as error:\n"
        "    print('SourceError', error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    run = subprocess.run(
        [sys.executable, "-c", code, REPO, revision or ""],
        env=environment, cwd=cache, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout


def test_the_real_client_offline(tmp_path):
    assert "cannot be reached" in run_offline(tmp_path, None)
    # The same with the model in the cache.
    repository = tmp_path / ("models--" + REPO.replace("/", "--"))
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for revision in (None, "main", COMMIT):
        assert run_offline(tmp_path, revision).split() == [str(snapshot), COMMIT]
    assert "cannot be reached" in run_offline(tmp_path, "v9")
