"""Rows of data: local files, the public cnn_dailymail set, data that comes with phireg.

Local files are read with Python's csv and json instead of ``datasets``: that package is an optional
dependency, and does not tell the line of a damaged row.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from phireg.errors import PhiregError, SourceError, UsageError
from phireg.files.regular import read_named

AUTO, CNN_DAILYMAIL = "auto", "cnn_dailymail"
CNN_REPOSITORY, CNN_CONFIG = "ccdv/cnn_dailymail", "3.0.0"

_INSTALL = "install it: pip install 'phireg[data]'"
_CONNECT_S = 3.0
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(frozen=True, slots=True)
class Row:
    """One record."""

    where: str  # file and line (a parquet file: row, counted from 1), for messages
    values: Mapping[str, Any]  # by column or key; of CSV and text files every value is text

    def text(self, *names: str) -> str:
        """Return the text of the first of these columns with a value; UsageError without one."""
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        value = self.values.get(name)
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise UsageError(f"{self.where}: '{name}' is not valid Unicode text") from None
            return value
        missing = f"there is no {' or '.join(map(repr, names))}"
        problem = f"'{name}' is not text" if name in self.values else missing
        # What stands in the place of names in another kind of file is not shown.
        columns = [name for name in map(str, self.values) if re.fullmatch(r"\w{1,40}", name)][:20]
        others = len(self.values) - len(columns)
        shown = ", ".join(columns) or "no column with a plain name"
        more = f" and {others} more" if columns and others else ""
        raise UsageError(f"{self.where}: {problem}", hint=f"the row has: {shown}{more}.")

    def token_ids(self, name: str) -> list[int]:
        """Return a column's list of token ids; raise UsageError for anything else."""
        value = self.values[name]
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise UsageError(f"{self.where}: '{name}' is no list of token ids")
        ids = list(value)
        for number in ids:
            if not isinstance(number, int) or isinstance(number, bool):
                raise UsageError(f"{self.where}: '{name}' has {number!r}, which is no token id")
        if not ids:
            raise UsageError(f"{self.where}: the row is empty", hint="remove it, or give it text.")
        return ids


@dataclass(frozen=True, slots=True)
class Data:
    """Rows and where they are from."""

    name: str  # the origin in words, for output
    rows: list[Row]  # at least one
    note: str | None = None  # why ``auto`` did not take the public set


def load_rows(
    source: str, split: str, count: int, bundled: Mapping[str, Callable[[], Data]]
) -> Data:
    """Load the rows that a user names.

    The source is a file, as ``read_rows`` takes; "cnn_dailymail", or a directory with a copy of
    it; a name of ``bundled``, data that needs no network; or "auto": cnn_dailymail, or if it is
    not available the first of ``bundled``, with a note. Split and count are of cnn_dailymail.
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
        return Data(source, read_rows(path))
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
    """Load the first rows of a split of cnn_dailymail 3.0.0, with ``article`` and ``highlights``.

    They come from the hub, or from a directory with a copy of its ccdv/cnn_dailymail, of which no
    more rows are read than asked for.
    """
    try:
        import datasets
    except ImportError:
        raise SourceError(
            "cnn_dailymail needs the package 'datasets', which is not installed", hint=_INSTALL
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


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file, in the format that its suffix names.

    ``.jsonl`` and ``.json`` have one JSON object per line (empty lines are skipped), ``.csv`` names
    the columns in its first record, ``.txt`` has one text per line that is not empty, as the value
    ``text``. ``.parquet`` needs pyarrow.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
        ".txt": _text_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path}: unknown kind of data file", hint=f"known endings: {', '.join(readers)}."
        )
    rows = list(reader(path))
    if not rows:
        raise UsageError(f"{path} holds no rows", hint="is it the right file?")
    return rows


def decode_text(name: str, content: bytes) -> str:
    """Decode UTF-8 with or without a byte order mark; UsageError with the line of other bytes."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{name}:{line}: not UTF-8 text (byte {error.start})", hint="save it as UTF-8."
        ) from None


def text_lines(name: str, content: bytes) -> list[tuple[str, str]]:
    """Return place (``name:number``) and text of the lines that are not empty."""
    return [
        (f"{name}:{number}", line.removesuffix("\r"))
        for number, line in enumerate(decode_text(name, content).split("\n"), 1)
        if line.strip()
    ]


def parse_object(where: str, line: str) -> dict[str, Any]:
    """Parse a line of JSON; raise UsageError if it is not an object."""
    hint = "each line must be one JSON object."
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a JSON {type(value).__name__}, not an object", hint=hint)
    return value


def _json_rows(path: Path) -> Iterator[Row]:
    for where, line in text_lines(str(path), read_named(path)):
        yield Row(where, parse_object(where, line))


def _text_rows(path: Path) -> Iterator[Row]:
    for where, line in text_lines(str(path), read_named(path)):
        yield Row(where, {"text": line})


def _csv_rows(path: Path) -> Iterator[Row]:
    # The reader's own limit of 128 KiB is shorter than some articles.
    csv.field_size_limit(2**30)
    text = decode_text(str(path), read_named(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if names is None:
                names = cells
            elif len(cells) != len(names):
                raise UsageError(f"{where}: {len(cells)} values for {len(names)} columns")
            else:
                yield Row(where, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise UsageError(f"{path}:{line}: not CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"{path}: parquet files need the package 'pyarrow', which is not installed",
            hint=_INSTALL,
        ) from None
    content = io.BytesIO(read_named(path))
    try:
        values = parquet.read_table(content).to_pylist()
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a parquet file that can be read: {reason}") from None
    for number, row in enumerate(values, 1):
        yield Row(f"{path}:{number}", row)
