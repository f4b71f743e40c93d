"""Sizes for people."""


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
