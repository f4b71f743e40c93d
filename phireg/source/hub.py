"""The directory of a model: a local path, or a download from the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from phireg.errors import SourceError, UsageError
from phireg.files.kinds import TOKENIZER_FILES

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PATH_LIKE = ("/", "./", "../", "~")
# The model card has the license.
_DATA = ["config.json", "adapter_config.json", "README.md", *TOKENIZER_FILES]
_SAFETENSORS = ["*.safetensors", "model.safetensors.index.json"]
_BIN = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def resolve_model_dir(model_dir: str, revision: str | None) -> tuple[Path, str | None]:
    """Find the directory of a model, downloading it when it is named by its hub repository.

    Only data files are downloaded, never Python code, and .bin weights only from a repository
    that has no safetensors. Without a network the Hugging Face cache is used. The second result is
    the commit that ``revision`` was resolved to; None for a local directory, which is preferred.
    """
    path = Path(model_dir)
    if model_dir.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:
            raise SourceError(f"{model_dir}: no such directory") from None
    if model_dir and _exists(path):
        if revision is not None:
            raise UsageError(
                f"--revision {revision} was given, but {model_dir} is a local path",
                hint="leave --revision away, or name a hub repository as owner/name",
            )
        if not path.is_dir():
            raise SourceError(
                f"{model_dir}: this is a file, not a directory",
                hint="give the directory that holds config.json and the weights",
            )
        return path, None
    if model_dir.startswith(_PATH_LIKE) or not _REPOSITORY.fullmatch(model_dir):
        raise SourceError(
            f"{model_dir!r}: no such directory",
            hint="give a local model directory, or a hub repository as owner/name",
        )
    return _download(model_dir, revision)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # not permitted, too long, or a NUL
        return False


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    import huggingface_hub

    def snapshot(patterns: list[str]) -> Path:
        # Root files only: subfolders hold other exports of the same weights.
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "*.py"],
            )
        )

    try:
        folder = snapshot(_DATA + _SAFETENSORS)
        if not any(folder.glob("*.safetensors")):
            folder = snapshot(_DATA + _BIN)
    except Exception as error:
        # The client raises its own classes, its HTTP library's, OSError and ValueError.
        raise _explain(repository, revision, error) from error
    # The cache keeps each revision as snapshots/<commit>.
    return folder, folder.name


def _explain(repository: str, revision: str | None, error: Any) -> SourceError:
    from huggingface_hub import utils

    where = f"{repository} on the Hugging Face Hub"
    at = f" at revision {revision}" if revision is not None else ""
    if isinstance(error, utils.GatedRepoError):  # before RepositoryNotFoundError, its base
        return SourceError(
            f"{where}: access is restricted",
            hint="accept the terms on the model's page, then log in with: hf auth login",
        )
    if isinstance(error, utils.RepositoryNotFoundError):
        return SourceError(
            f"{where}: no such repository, and no local directory of that name",
            hint="check the spelling; for a private repository log in with: hf auth login",
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return SourceError(
            f"{where}: no revision {revision}",
            hint="give a branch, a tag or a full commit hash of that repository",
        )
    if isinstance(error, (utils.LocalEntryNotFoundError, utils.OfflineModeIsEnabled)):
        return SourceError(
            f"{where}{at}: the hub cannot be reached and the model is not in the local cache",
            hint="connect to the network (and unset HF_HUB_OFFLINE), or give a local directory",
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return SourceError(
        f"{where}{at}: the download failed: {reason}",
        hint="try again, or download the model another way and give its directory",
    )
