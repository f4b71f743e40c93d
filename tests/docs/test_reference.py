"""docs/hooks.md is what docs/generate.py writes, and names everything a plugin can use."""

import re
import subprocess
import sys
from pathlib import Path

from phireg import api
from phireg.hookspecs import Steps

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "hooks.md").read_text()


def test_the_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_hook_and_word_has_a_section():
    sections = re.findall(r"^### (\w+)\n\n(\S[^\n]*)", PAGE, re.MULTILINE)
    hooks = [name for name in vars(Steps) if name.startswith("phireg_")]
    assert [name for name, _ in sections] == [*hooks, *api.__all__]
    assert "object at 0x" not in PAGE
