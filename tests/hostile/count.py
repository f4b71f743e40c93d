"""Count the hostile inputs that tests try, by kind, as a table of Markdown.

    python tests/hostile/count.py

Tests have the marker ``hostile(kind)``; each of their parameters is an input.
"""

import contextlib
import io
from collections import Counter
from pathlib import Path

import pytest


class Kinds:
    """A plugin of pytest that counts what is collected."""

    def __init__(self):
        self.count = Counter()

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.count.update({mark.args[0] for mark in item.iter_markers("hostile")})


def counts(*paths):
    kinds = Kinds()
    options = ["--collect-only", "-q", "-m", "hostile", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main([*options, *map(str, paths)], plugins=[kinds])
    assert code == 0, output.getvalue()
    return kinds.count


def table(count):
    rows = [f"| {kind} | {number:,} |" for kind, number in sorted(count.items())]
    return "\n".join(["| kind | inputs |", "|---|---|", *rows, f"| all | {count.total():,} |"])


if __name__ == "__main__":
    tests = Path(__file__).parents[1].rglob("test_*.py")
    print(table(counts(*(path for path in tests if "mark.hostile(" in path.read_text()))))
