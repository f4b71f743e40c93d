"""Let transformers releases write models, convert them, and compare with the logits they computed.

    python tests/writers/matrix.py ENVIRONMENTS [--record]

prints a table of relative errors, one row for each case of write_models.py; ENVIRONMENTS is a
directory that environments.py made. ``--record`` keeps every model whose config.json no older
release wrote alike, in ``recorded/CASE/RELEASE``.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import phireg_plugins
from safetensors.torch import load_file

import phireg
from phireg.executor import load

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"

TOLERANCE = 2e-4
"""Of logits, relative: what verify allows two layers in float32."""

ALIKE = (
    *("phi-defaults", "phi-keywords", "phi3-defaults", "phi3-keywords", "phi3-long-keywords"),
    *("phi3-tied-bin", "phi3-shards"),
)
"""Cases that are not recorded: their files differ from those of others only in the values."""

MISREAD = {("4.45", "phi3-partial")}
"""What a release computes otherwise than its file says: 4.45 keeps the key partial_rotary_factor of
a Phi-3 and rotates whole heads. Every later release reads the file as phireg does."""


def releases(environments):
    """The releases that have an environment, oldest first."""
    names = [
        place.parents[1].name.removeprefix("tf") for place in environments.glob("tf*/bin/python")
    ]
    return sorted(names, key=lambda name: [int(number) for number in name.split(".")])


def write(environments, release, directory):
    """Let a release write its models; return why it cannot make others, by case."""
    packages = directory.with_name(f"{directory.name}-packages")
    packages.mkdir(parents=True)
    for package in (phireg, phireg_plugins):  # an editable install has other names for them
        (packages / package.__name__).symlink_to(package.__path__[0])
    variables = {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [environments / f"tf{release}" / "bin" / "python", HERE / "write_models.py", directory],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"transformers {release}: {ran.stderr[-2000:]}")
    return dict(line.split(": ", 1) for line in ran.stdout.splitlines())


def models(directory):
    """The models in a directory, by case."""
    return {
        place.parent.name: place.parent for place in sorted(directory.glob("*/logits.safetensors"))
    }


def error(model, checkpoint):
    """Convert a model; return the largest relative error of its logits."""
    phireg.convert(phireg.plan(model, dtype="float32"), checkpoint)
    executor = load(checkpoint, device="cpu", dtype="float32")
    written, errors = load_file(model / "logits.safetensors"), []
    for name, ids in written.items():
        if name.startswith("ids"):
            expected = written[name.replace("ids", "logits")]
            difference = executor(ids[None])[0] - expected
            errors.append(float(difference.norm() / expected.norm()))
    return max(errors)


def main(environments, record):
    table, seen = {}, set()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for release in releases(environments):
            write(environments, release, scratch / release)
            for case, model in models(scratch / release).items():
                off = error(model, scratch / f"{release}-{case}")
                table.setdefault(case, {})[release] = f"{off:.0e}"
                config = json.loads((model / "config.json").read_text())
                config.pop("transformers_version")
                form = case, json.dumps(config, sort_keys=True)
                if (
                    record
                    and form not in seen
                    and case not in ALIKE
                    and (release, case) not in MISREAD
                ):
                    shutil.copytree(model, RECORDED / case / release, dirs_exist_ok=True)
                seen.add(form)
    names = releases(environments)
    rows = [[case, *(row.get(name, "-") for name in names)] for case, row in sorted(table.items())]
    for cells in (["case", *names], ["---"] * (len(names) + 1), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--record" in sys.argv)
