"""JSON files, read strictly: one object, every key once, finite numbers only."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from phireg.errors import SourceError
from phireg.files.regular import Limit, disguise, read_file

_DEEPEST = 50
_LONGEST_KEY = 1000
_MOST_DIGITS = 300  # a whole number that fits into a double, as some tokenizers' lengths do


def read_json_object(path: Path, *, limit: int = Limit.JSON) -> dict[str, Any]:
    """Read a file that must hold one JSON object of at most ``limit`` bytes."""
    raw = read_file(path, limit)
    if known := disguise(raw[:64]):
        raise SourceError(f"{path}: {known[0]}", hint=known[1])
    try:
        return parse_object(raw)
    except ValueError as error:
        raise SourceError(
            f"{path}: {error}", hint="compare the file with the one that was published"
        ) from None


def encode_object(document: Mapping[str, Any]) -> bytes:
    """Encode an object as :func:`parse_object` takes it; what is no text becomes question marks."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "replace")


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse one JSON object from UTF-8 bytes; a ValueError says what is wrong and in which line."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise ValueError("empty, not JSON")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_integer,
        )
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object, found another kind of value")
        _check_depth(value)
        if "\\ud" in text.lower():
            # A lone surrogate escape parses, but can be neither printed nor written again.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except UnicodeEncodeError:
        raise ValueError("not valid text: an escaped surrogate without its other half") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    for key in result:
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"a key has {len(key)} characters, more than {_LONGEST_KEY}")
    if len(result) != len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large for a double")
    return value


def _bounded_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"the number {digits[:40]}... of {len(digits)} digits is too large")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {_DEEPEST} deep")
