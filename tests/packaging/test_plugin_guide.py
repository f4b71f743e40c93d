"""docs/plugin-authors.md, done as it stands there, in a fresh environment."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.fresh_environment import FreshEnvironment

pytestmark = pytest.mark.slow

GUIDE = (Path(__file__).parents[2] / "docs" / "plugin-authors.md").read_text()
FENCE = re.compile(r"^(<!-- fails -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    language: str
    text: str
    fails: bool


BLOCKS = [Block(kind, text, bool(fails)) for fails, kind, text in FENCE.findall(GUIDE)]


@pytest.fixture
def environment(tmp_path_factory, phireg_wheel):
    environment = FreshEnvironment(tmp_path_factory.mktemp("environment"))
    environment.variables["PIP_FIND_LINKS"] = str(phireg_wheel.parent)
    return environment


def test_the_guide_does_what_it_says(environment, tmp_path):
    output = ""
    for number, block in enumerate(BLOCKS):
        first = block.text.partition("\n")[0]
        if block.language == "sh":
            output = ""
            for line in block.text.splitlines():
                done = environment.run(line, shell=True, cwd=tmp_path)
                output += done.stdout + done.stderr
                assert (done.returncode != 0) == block.fails, f"{line}\n{output}"
            if number == 0:
                check_counts(block, tmp_path)
        elif block.language == "text":
            check_output(block.text, output)
        elif first.startswith("# "):
            (tmp_path / first.removeprefix("# ")).write_text(block.text)
        else:
            assert block.language == "python"
            environment.check("python", "-c", block.text, cwd=tmp_path)


def check_counts(block, directory):
    """Count the commands, files and lines that the guide counts."""
    commands = len(block.text.splitlines())
    ignored = {"__pycache__", ".pytest_cache", "acme_phi.egg-info"}
    written = [
        path
        for path in (directory / "acme-phi").rglob("*")
        if path.is_file() and not ignored & set(path.parts)
    ]
    lines = sum(len(file.read_text().splitlines()) for file in written)
    sentence = f"{commands} commands. The second one wrote {len(written)} files with {lines} lines"
    assert sentence in GUIDE


def check_output(expected, output):
    """Each line stands in the output, in that order; ... stands for any lines."""
    lines = iter([" ".join(line.split()) for line in output.splitlines()])
    for line in expected.splitlines():
        words = " ".join(line.split())
        assert words == "..." or any(words in other for other in lines), f"{line!r}\n{output}"


def test_every_kind_of_block_is_known():
    assert {block.language for block in BLOCKS} == {"sh", "text", "python"}
    assert sum(block.language == "sh" for block in BLOCKS) >= 5
    assert GUIDE.count("```") == 2 * len(BLOCKS)
