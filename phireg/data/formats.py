"""Rows in files: JSON, CSV, parquet, plain text, and token ids as TensorRT-LLM's run.py takes them.

They are read with Python's csv and json instead of ``datasets``: that package is an optional
dependency, and does not tell the line of a damaged row. Rows come one by one: what is damaged
behind the last one that is taken does not matter.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from phireg.data.row import INPUT_IDS, PaddedIds, Row
from phireg.errors import UsageError
from phireg.files.regular import read_named

INSTALL = "install it: pip install 'phireg[data]'"
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 64


def read_rows(path: Path, count: int | None = None) -> list[Row]:
    """Read the first rows of a file, or all, in the format that its suffix names.

    ``.jsonl`` and ``.json`` have one JSON object per line (empty lines are skipped) or are one
    array of them, ``.txt`` has one text per line that is not empty, as the value ``text``,
    ``.parquet`` needs pyarrow. ``.csv`` names the columns in its first record; or every record is
    a row of token ids. ``.npy`` is an array of token ids, padded where rows differ in length.
    """
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        raise unknown_kind(str(path))
    rows = list(islice(reader(str(path), read_named(path)), count))
    if not rows:
        raise UsageError(f"{path} holds no rows", hint="is it the right file?")
    return rows


def unknown_kind(name: str) -> UsageError:
    """Say which kinds of files are read."""
    return UsageError(
        f"{name}: unknown kind of data file", hint=f"known endings: {', '.join(FORMATS)}."
    )


def decode_text(name: str, content: bytes, line: int | None = None) -> str:
    """Decode UTF-8 with or without a byte order mark; UsageError with the line of other bytes."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = line or content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name}:{line}: not UTF-8 text", hint="save it as UTF-8.") from None


def text_lines(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Yield place (``name:number``) and text of the lines that are not empty."""
    for number, raw in enumerate(io.BytesIO(content.removeprefix(_BOM)), 1):
        line = decode_text(name, raw, number).removesuffix("\n").removesuffix("\r")
        if line.strip():
            yield f"{name}:{number}", line


def json_rows(name: str, content: bytes) -> Iterator[Row]:
    """Yield the objects of lines of JSON, or of one array."""
    if name.endswith(".json") and content.removeprefix(_BOM).lstrip()[:1] == b"[":
        values = _parsed(name, decode_text(name, content), "give an array of objects.")
        for number, value in enumerate(values, 1):
            yield Row(f"{name}, row {number}", _object(f"{name}, row {number}", value))
        return
    for where, line in text_lines(name, content):
        value = _parsed(where, line, "each line must be one JSON object.")
        yield Row(where, _object(where, value))


def _parsed(where: str, text: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}", hint=hint) from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UsageError(
        f"{where}: a JSON {type(value).__name__}, not an object", hint="give one object per row."
    )


def _text_rows(name: str, content: bytes) -> Iterator[Row]:
    for where, line in text_lines(name, content):
        yield Row(where, {"text": line})


def _csv_rows(name: str, content: bytes) -> Iterator[Row]:
    # The reader's own limit of 128 KiB is shorter than some articles.
    csv.field_size_limit(2**30)
    text = io.TextIOWrapper(
        io.BytesIO(content), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )
    reader = csv.reader(text, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if not cells:
                line = reader.line_num + 1
                continue
            decode_text(name, "".join(cells).encode("utf-8", "surrogateescape"), line)
            where, line = f"{name}:{line}", reader.line_num + 1
            if names is None:
                names = [] if all(map(_is_number, cells)) else cells
                if names:
                    continue
            if not names:
                yield Row(where, {INPUT_IDS: [int(c) if _is_number(c) else c for c in cells]})
            elif len(cells) != len(names):
                raise UsageError(f"{where}: {len(cells)} values for {len(names)} columns")
            else:
                yield Row(where, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise UsageError(f"{name}:{line}: not CSV: {error}") from None


def _is_number(cell: str) -> bool:
    return cell.strip().isascii() and cell.strip().isdigit() and len(cell) < 20


def _npy_rows(name: str, content: bytes) -> Iterator[Row]:
    import numpy as np

    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception:  # damaged headers raise anything; objects are not loaded, whoever made them
        raise UsageError(
            f"{name}: not a whole array of numbers, as numpy.save writes it",
            hint="save the ids as integers, or write them as .csv.",
        ) from None
    kind = getattr(array, "dtype", np.dtype(object))
    if kind.kind not in "iu" or array.ndim not in (1, 2):
        raise UsageError(
            f"{name}: not an array of token ids, [rows, tokens] of integers",
            hint="save the ids with numpy.save.",
        )
    for number, ids in enumerate(np.atleast_2d(array), 1):
        yield Row(f"{name}, row {number}", {INPUT_IDS: PaddedIds(ids.tolist())})


def _parquet_rows(name: str, content: bytes) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"{name}: parquet files need the package 'pyarrow', which is not installed",
            hint=INSTALL,
        ) from None
    try:
        # A small file may hold gigabytes: no more is unpacked than is taken.
        batches = parquet.ParquetFile(io.BytesIO(content)).iter_batches(_PARQUET_ROWS)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield Row(f"{name}:{number}", row)
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name}: not a parquet file that can be read: {reason}") from None


FORMATS: dict[str, Callable[[str, bytes], Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": _csv_rows,
    ".npy": _npy_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
"""Readers of a file's content by its suffix."""

# fmt: off
OTHER_KINDS = frozenset([
    ".tsv", ".xlsx", ".xls", ".ods", ".pdf", ".doc", ".docx", ".odt", ".rtf",
    ".arrow", ".feather", ".avro", ".npz", ".pt", ".pth", ".pkl", ".bin", ".safetensors",
    ".gguf", ".h5", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z",
])
# fmt: on
"""Suffixes of files that are never a prompt per line."""
