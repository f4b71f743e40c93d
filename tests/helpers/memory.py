"""The growth of a process's resident memory, for scripts that tests run."""

import json
import os
import subprocess
import sys

RESIDENT = """
from pathlib import Path

def resident(line):
    # Not ru_maxrss: a child inherits its parent's, which hides everything below it.
    status = Path("/proc/self/status").read_text()
    return next(int(l.split()[1]) * 1024 for l in status.splitlines() if l.startswith(line))
"""


def measure(script, *args):
    """Run a script that may call resident("VmRSS") and ("VmHWM"); the JSON that it prints."""
    command = [sys.executable, "-c", RESIDENT + script, *map(str, args)]
    # Threads that happen to meet in the allocator make it keep an arena each.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])
