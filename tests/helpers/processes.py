"""What is known of other processes."""

import time
from pathlib import Path


def lives(pid):
    """Return whether a process still runs; a zombie has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends(pid, seconds=10):
    """Return whether a process that was told to end does so."""
    deadline = time.monotonic() + seconds
    while lives(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
