"""What tests of the output directory share."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from output_victim import NEW, fill

from phireg.errors import OutputError
from phireg.files.output import OutputDirectory

ROOT = Path(__file__).parents[2]
VICTIM = Path(__file__).with_name("output_victim.py")
Usage = namedtuple("Usage", "total used free")


def content(directory):
    """File name -> text of a flat directory."""
    return {path.name: path.read_text() for path in directory.iterdir()}


def names(directory):
    return [path.name for path in directory.iterdir()]


def tree(base):
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


def open_output(target, *, overwrite=False, required_bytes=0):
    return OutputDirectory(target, overwrite=overwrite, required_bytes=required_bytes)


def convert(target, files=NEW, *, overwrite=False):
    with open_output(target, overwrite=overwrite) as partial:
        fill(partial, files)


def refused(*args, **options):
    """Check that an output is refused with a reason, and return that."""
    with pytest.raises(OutputError) as caught:
        convert(*args, **options)
    return str(caught.value)


def python(code, *arguments, **options):
    """Start another Python with phireg importable; its output comes as text."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
