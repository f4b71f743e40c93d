"""Post-process in place and be killed: ``postprocess_victim.py SOURCE BASE`` fills BASE/1, ..."""

import shutil
import sys
from pathlib import Path

from helpers.kills import kill_everywhere

import phireg


def main(source, base):
    def prepare(directory):
        shutil.copytree(source, directory / "ckpt")

    def run(directory):
        phireg.postprocess(directory / "ckpt")

    # Modules are imported here, or every lazy import would be a moment.
    prepare(base / "0")
    run(base / "0")
    return kill_everywhere(base, prepare, run)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
