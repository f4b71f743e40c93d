"""Rows of local data files, and of the public cnn_dailymail set.

A row knows where it came from, so that whoever misses a value in it can name file and line.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phireg.errors import SourceError, UsageError

CNN_DAILYMAIL = "ccdv/cnn_dailymail"
CNN_DAILYMAIL_CONFIG = "3.0.0"

_INSTALL = "install it: pip install 'phireg[data]'"


@dataclass(frozen=True, slots=True)
class Row:
    """One record.

    Attributes:
        where: file and line (a parquet file: row, counted from 1), for messages.
        values: column or key to value; of CSV and text files every value is text.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A value that must be text.

        Raises:
            UsageError: it is missing or something else.
        """
        value = self.values.get(name)
        if not isinstance(value, str):
            problem = f"'{name}' is not text" if name in self.values else f"there is no '{name}'"
            found = ", ".join(map(str, self.values)) or "nothing"
            raise UsageError(f"{self.where}: {problem}", hint=f"the row has: {found}.")
        return value


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; its name's ending says of what kind it is.

    Args:
        path: ``.jsonl`` or ``.json`` (one JSON object per line; empty lines are skipped), ``.csv``
            (the first record names the columns), ``.parquet`` (needs pyarrow), or ``.txt`` (one
            text per line that is not empty, as the value ``text``).

    Raises:
        UsageError: there is no such file, it has no rows, or something in it is damaged; the
            message names file and line.
    """
    kinds: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
        ".txt": _text_rows,
    }
    reader = kinds.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path}: unknown kind of data file", hint=f"known endings: {', '.join(kinds)}."
        )
    try:
        rows = list(reader(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise UsageError(f"{path} holds no rows", hint="is it the right file?")
    return rows


def cnn_dailymail(split: str, count: int, *, dataset_dir: str | None = None) -> list[Row]:
    """The first ``count`` rows of a split of cnn_dailymail 3.0.0: ``article``, ``highlights``.

    Args:
        split: "train", "validation" or "test".
        count: how many; fewer if the split is shorter.
        dataset_dir: a local copy of the set's repository (or another name on the hub), in place
            of the hub's ccdv/cnn_dailymail.

    Raises:
        SourceError: ``datasets`` is not installed, or the set cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise SourceError(
            "cnn_dailymail needs the package 'datasets', which is not installed", hint=_INSTALL
        ) from None
    name = dataset_dir or CNN_DAILYMAIL
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports every attempt without a network
    try:
        found = datasets.load_dataset(name, CNN_DAILYMAIL_CONFIG, split=split)
        rows = [dict(found[n]) for n in range(min(count, len(found)))]
    except Exception as error:  # no network, a proxy's page, a damaged cache: anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"{name} {CNN_DAILYMAIL_CONFIG} ({split}) cannot be loaded: {reason}",
            hint="it is downloaded from the Hugging Face hub and then kept; without a network "
            "give a local file of articles instead."
            if dataset_dir is None
            else f"give a copy of the hub's {CNN_DAILYMAIL}, or a local file of articles.",
        ) from None
    finally:
        logger.setLevel(level)
    return [Row(f"{name} ({split}) row {n}", values) for n, values in enumerate(rows, 1)]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of the lines that are not empty."""
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.removesuffix("\r")


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8 text (byte {error.start})", hint="save it as UTF-8."
        ) from None


def _json_rows(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: not JSON: {error}", hint="each line must be one JSON object."
            ) from None
        if not isinstance(value, dict):
            raise UsageError(
                f"{where}: a JSON {type(value).__name__}, not an object",
                hint="each line must be one JSON object.",
            )
        yield Row(where, value)


def _text_rows(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        yield Row(where, {"text": line})


def _csv_rows(path: Path) -> Iterator[Row]:
    # Articles are longer than the reader's own limit of 128 KiB may allow.
    csv.field_size_limit(2**30)
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
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
    path.stat()  # pyarrow's own words for a missing file are others
    try:
        values = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a parquet file that can be read: {reason}") from None
    for number, row in enumerate(values, 1):
        yield Row(f"{path}:{number}", row)
