"""Write outputs and be killed: ``output_victim.py SCENARIO BASE`` fills BASE/1, BASE/2, ..."""

import json
import sys
from contextlib import suppress
from pathlib import Path

from helpers.kills import kill_everywhere

from phireg.files.output import OutputDirectory

OLD = {"config.json": '{"architecture": "Old"}', "rank0.safetensors": "old"}
NEW = {
    "config.json": '{"architecture": "New"}',
    "rank0.safetensors": "new0",
    "rank1.safetensors": "new1",
}


def fill(directory, files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def leave_stale(base, **parts):
    """What a killed run leaves: the marker without a lock, and the given sub-directories."""
    partial = base / "out.phireg-partial"
    fill(partial, {".phireg-partial": json.dumps({"pid": 1, "host": "gone"})})
    for name, files in parts.items():
        fill(partial / name, files)
    return partial


def prepare(scenario, base):
    if scenario in ("overwrite", "interrupted"):
        fill(base / "out", OLD)
    elif scenario == "empty":
        (base / "out").mkdir()
    elif scenario == "stale":
        leave_stale(base, unfinished=NEW)
    elif scenario == "put-back":
        leave_stale(base, unfinished=NEW, replaced=OLD)
    elif scenario == "finish":
        fill(base / "out", NEW)
        leave_stale(base, replaced=OLD)


def convert(scenario, base):
    output = OutputDirectory(base / "out", overwrite=True, required_bytes=0)
    with suppress(KeyboardInterrupt), output as partial:
        fill(partial, NEW)
        if scenario == "interrupted":
            raise KeyboardInterrupt


def main(scenario, base):
    def prepare_empty(directory):
        directory.mkdir(parents=True)
        prepare(scenario, directory)

    return kill_everywhere(base, prepare_empty, lambda directory: convert(scenario, directory))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
