"""Make a virtual environment for each transformers release that writes models for the tests.

    python tests/writers/environments.py DIRECTORY

``DIRECTORY/tf4.45/bin/python`` and so on then have that release and what it depends on; torch comes
from the environment that runs this script.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

RELEASES = {
    "4.45": "4.45.2",
    "4.51": "4.51.3",
    "4.57": "4.57.6",
    "5.0": "5.0.0",
    "5.5": "5.5.4",
    "5.10": "5.10.4",
    "5.17": "5.17.0",
    "5.24": "5.24.0",
}


def make(place, version):
    """Make one environment."""
    venv.create(place, with_pip=True)
    install = [place / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"transformers=={version}"], check=True)
    # A .pth file puts torch's packages behind the environment's own.
    packages = next((place / "lib").glob("python*")) / "site-packages"
    (packages / "torch.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")


if __name__ == "__main__":
    for release, version in RELEASES.items():
        make(Path(sys.argv[1]) / f"tf{release}", version)
