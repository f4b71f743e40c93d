"""Rows of data: local files, the public cnn_dailymail set, data that comes with phireg."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from phireg.data.formats import INSTALL, read_rows
from phireg.data.row import Row
from phireg.errors import PhiregError, SourceError, UsageError

AUTO, CNN_DAILYMAIL = "auto", "cnn_dailymail"
CNN_REPOSITORY, CNN_CONFIG = "ccdv/cnn_dailymail", "3.0.0"

_CONNECT_S = 3.0
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(frozen=True, slots=True)
class Data:
    """Rows and where they are from."""

    name: str  # the origin in words, for output
    rows: list[Row]  # at least one
    note: str | None = None  # why ``auto`` did not take the public set


def load_rows(
    source: str, split: str, count: int, bundled: Mapping[str, Callable[[], Data]]
) -> Data:
    """Load the first rows that a user names.

    The source is a file, as ``read_rows`` takes; "cnn_dailymail", or a directory with a copy of
    it; a name of ``bundled``, data that needs no network; or "auto": cnn_dailymail, or if it is
    not available the first of ``bundled``, with a note. The split is of cnn_dailymail.
    """
    path = Path(source)
    if source in bundled:
        return bundled[source]()
    if source == AUTO:
        reason = _unavailable()
        if reason is None:
            try:
                return cnn_dailymail(split, count)
            except PhiregError as error:
                reason = error.message
        return replace(next(iter(bundled.values()))(), note=reason)
    if source == CNN_DAILYMAIL:
        return cnn_dailymail(split, count)
    if path.is_dir():
        # TensorRT-LLM's scripts take the directory above the set's own name as well.
        copy = path / CNN_REPOSITORY
        return cnn_dailymail(split, count, str(copy if copy.is_dir() else path))
    if path.is_file() or path.suffix:
        return Data(source, read_rows(path, count))
    raise UsageError(
        f"unknown data '{source}': no such file or directory",
        hint=f"give a file of rows, {CNN_DAILYMAIL}, a directory with a copy of it, or "
        f"{', '.join(bundled)}.",
    )


def _unavailable() -> str | None:
    """Return why the public set need not be tried; None if it may be available."""
    if importlib.util.find_spec("datasets") is None:
        return "the package 'datasets' is not installed"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in _PROXIES):
        return None  # only the proxy can tell
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or 443), _CONNECT_S).close()
    except OSError:
        return f"{hub.hostname} cannot be reached"
    return None


def cnn_dailymail(split: str, count: int, directory: str | None = None) -> Data:
    """Load rows of cnn_dailymail 3.0.0 from the hub, or from a directory with a copy."""
    try:
        import datasets
    except ImportError:
        raise SourceError(
            "cnn_dailymail needs the package 'datasets', which is not installed", hint=INSTALL
        ) from None
    repository = directory or CNN_REPOSITORY
    if scripts := sorted(Path(repository).glob("*.py")):
        raise SourceError(
            f"{scripts[0]}: a script that loads data is not run",
            hint="give a copy that has the rows themselves, as parquet files.",
        )
    if directory is None and Path(repository).exists():
        raise SourceError(
            f"{Path(repository).absolute()} would be taken for the hub's {repository}",
            hint="name it as the data to use, or rename it.",
        )
    options: dict[str, Any] = {"streaming": True} if directory else {}
    if int(datasets.__version__.partition(".")[0]) < 4:  # these run scripts, or ask
        options["trust_remote_code"] = False
    name = f"{repository} {CNN_CONFIG}, {split}"
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs every attempt without a network
    try:
        table = datasets.load_dataset(repository, CNN_CONFIG, split=split, **options)
        values = [dict(row) for row in islice(table, count)]
    except Exception as error:  # no network, a proxy's page, a damaged cache: anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"{name} cannot be loaded: {reason}",
            hint="it is downloaded from the Hugging Face hub and then kept; without a network "
            "give a local file of articles instead."
            if directory is None
            else f"give a copy of the hub's {CNN_REPOSITORY}, or a local file of articles.",
        ) from None
    finally:
        logger.setLevel(level)
    return Data(name, [Row(f"{name}, row {n}", row) for n, row in enumerate(values, 1)])
