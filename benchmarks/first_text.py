"""Measure the time from ``git clone`` to the first generated text, step by step.

python benchmarks/first_text.py [REPOSITORY]

REPOSITORY is what ``git clone`` takes, by default this clone. The steps are those of the README, in
a new directory and a new virtual environment; packages come from where pip gets them here, without
its cache.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    repository = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as place:
        clone, environment = Path(place) / "clone", Path(place) / "environment"
        pip = [environment / "bin" / "pip", "install", "--quiet", "--no-cache-dir"]
        steps = {
            "clone": ["git", "clone", "--quiet", repository, clone],
            "environment": [sys.executable, "-m", "venv", environment],
            "install": [*pip, "-c", "constraints.txt", "."],
            "demo": [environment / "bin" / "phireg", "demo"],
        }
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        started = time.monotonic()
        for name, command in steps.items():
            before = time.monotonic()
            done = subprocess.run(
                [str(word) for word in command],
                cwd=clone if clone.exists() else place,
                env=variables,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stdout}{done.stderr}")
            print(f"{name:12} {time.monotonic() - before:7.1f} s")
        print(f"{'all':12} {time.monotonic() - started:7.1f} s")
        print(done.stdout[done.stdout.index("the model's summary") :])


if __name__ == "__main__":
    main()
