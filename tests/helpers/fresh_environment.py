"""A fresh virtual environment that borrows what phireg depends on, and wheels to install there.

What the running environment has (torch, transformers, pytest) can be imported in the fresh one, but
phireg itself and plugins are only what is installed there. Nothing is downloaded.
"""

import base64
import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path


class FreshEnvironment:
    """A virtual environment; commands in it find their programs there first."""

    def __init__(self, directory):
        self.directory = directory
        venv.create(directory, symlinks=True)
        base = {"base": directory, "platbase": directory}
        self.site_packages = Path(sysconfig.get_path("purelib", "posix_prefix", base))
        # A path in a .pth file is searched, but .pth files that lie there are not read: an editable
        # phireg of the running environment stays unknown.
        lent = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        (self.site_packages / "lent.pth").write_text("\n".join(lent) + "\n")
        programs = directory / "bin"
        for name in ("pip", "pytest"):
            run = f"import runpy\nrunpy.run_module({name!r}, run_name='__main__', alter_sys=True)\n"
            (programs / name).write_text(f"#!{programs}/python\n{run}")
            (programs / name).chmod(0o755)
        self.variables = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(directory),
            "OMP_NUM_THREADS": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_IGNORE_INSTALLED": "1",
            # pip reads the variable as the value of --build-isolation.
            "PIP_NO_BUILD_ISOLATION": "0",
        }

    def run(self, *command, cwd=None, shell=False, **variables):
        """Run a command; stdout and stderr are text."""
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "PIP_"))
        }
        environment |= self.variables | variables
        words = ["bash", "-euo", "pipefail", "-c", command[0]] if shell else map(str, command)
        return subprocess.run(
            [*words], cwd=cwd or self.directory, env=environment, capture_output=True, text=True
        )

    def check(self, *command, **options):
        """As :meth:`run`; a failure shows what the command said. Gives its standard output."""
        done = self.run(*command, **options)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, *wheels):
        """Install wheels, or directories to build, without what they require."""
        self.check("python", "-m", "pip", "install", "--quiet", *wheels)


def build_wheel(source, into):
    """The wheel of a source directory, built with the running environment's setuptools."""
    before = set(into.glob("*.whl"))
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index")
    done = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", into, source],
        capture_output=True,
        text=True,
        # The build must not leave anything in the checkout.
        cwd=into,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = set(into.glob("*.whl")) - before
    return wheel


def write_wheel(into, name, files, entry_points, version="1.0"):
    """A wheel as the standard describes it: the files, METADATA, WHEEL, entry points, RECORD."""
    escaped = name.replace("-", "_")
    info = f"{escaped}-{version}.dist-info"
    lines = "".join(f"{left} = {right}\n" for left, right in entry_points.items())
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[phireg.families]\n{lines}",
    }
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in contents.items())
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    wheel = into / f"{escaped}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return wheel


def _digest(text):
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
