"""phireg as a program of its own, started as pip's console script starts it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

SCRIPT = f"#!{sys.executable}\nfrom phireg.__main__ import main\nmain()\n"


def console_script(directory):
    """Write the script and return its path."""
    script = Path(directory) / "phireg"
    script.write_text(SCRIPT)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def offer(directory, family, code):
    """Offer a family as an installed distribution; ``directory`` must be on PYTHONPATH."""
    module = family.replace("-", "_")
    (directory / f"{module}.py").write_text(code)
    info = directory / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {family}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[phireg.families]\n{family} = {module}:FAMILY\n")


def shell_words(lines, *programs):
    """What a shell makes of lines: the words of each call of one of the programs."""
    says = "\n".join(f'{name}() {{ said {name} "$@"; }}' for name in programs)
    said = "set -euo pipefail; said() { printf '%s\\0' \"$@\"; printf '\\036'; }"
    command = ["bash", "-c", "\n".join((said, says, lines))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [call.split("\0")[:-1] for call in done.stdout.split("\x1e")[:-1]]


def run_shell(line, **variables):
    """Run a line of a shell, in which $PHIREG is the program."""
    env = os.environ | {key: str(value) for key, value in variables.items()}
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60)
