"""Sizes for people, and from them."""

import re


def size(count: int) -> str:
    """Bytes of files, in decimal units as disks are sold and tools show them."""
    if count < 1000:
        return f"{count} bytes"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} TB"


_UNITS = {
    "": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def parse_size(text: str) -> int:
    """Return the bytes that ``5GB``, ``500MB`` or ``2GiB`` are; raise ValueError for other text."""
    match = re.fullmatch(r"(\d{1,15})\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not int(match[1]):
        raise ValueError(f"{text!r} is not a size: 5GB, 500MB and 2GiB are")
    return int(match[1]) * int(unit)
