"""The command's table, its exit codes, and the page."""

import html.parser
import re

import pytest
from click.testing import CliRunner
from planted import PLANTED
from verify_sources import converted, copied, edit_config, source

import phireg
from phireg.cli import app
from phireg.errors import OutputError
from phireg.verification.report import render, write_report

VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Every tag closed in order, and what stands where."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def count(self, tag, class_):
        return sum(t == tag and class_ in (a.get("class") or "").split() for t, a in self.tags)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    directory = copied("phi3-small", 2, tmp_path_factory.mktemp("damaged") / "<b>&checkpoint")
    PLANTED["interleave forgotten at TP 2"].damage(directory, "phi3-small")
    return directory


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_the_page_of_a_correct_checkpoint():
    page = Page(render(phireg.verify(converted("phi3-small", 2), source("phi3-small"))))
    text = " ".join(page.words)
    assert "✓ verified" in text
    assert page.count("circle", "attention") == page.count("circle", "mlp") == 3
    assert page.count("circle", "end-part") == 3
    assert page.count("circle", "wrong") == 0
    assert page.count("path", "stripe") == 8  # one picture for each head of the whole model
    assert "head 7 · rank 1" in text
    assert page.links == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|<script", "".join(text))


def test_the_page_of_a_wrong_one_says_where(damaged):
    page = Page(render(phireg.verify(damaged, source("phi3-small"))))
    text = " ".join(page.words)
    assert "✗ not its source" in text
    assert "<b>&checkpoint" in text  # shown as text, not obeyed
    assert page.count("circle", "wrong") == 1
    assert "first: layer 1 attention" in text
    assert "still grouped by KV head" in text


def test_a_family_without_sparse_layers_has_no_pattern():
    page = Page(render(phireg.verify(converted("phi2"), source("phi2"), checks=("structure",))))
    assert page.count("path", "cell") == 0
    assert "verified in part" in " ".join(page.words)


def test_nothing_in_a_checkpoint_reaches_the_page_unescaped(tmp_path):
    directory = copied("phi2", 1, tmp_path / "c")
    mark = "<script>alert(1)</script>\"'"
    edit_config(directory, lambda config: config.update({mark: 1, "hidden_act": mark}))
    text = render(phireg.verify(directory, source("phi2")))
    assert "<script" not in text
    Page(text)


def test_the_stripes_of_the_page_are_the_models_blocks(damaged):
    """Head 0 of stride 5 sees remote block 4, head 3 block 1: from the published formula."""
    text = render(phireg.verify(damaged, source("phi3-small"), checks=("structure",)))
    paths = re.findall(r'<path d="([^"]*)" class="cell stripe"', text)
    size = {path: len(re.findall("M", path)) for path in paths}
    blocks = 2 + 5 + 2

    def remote(head):
        return sum(
            (key + head + 1) % 5 == 0
            for query in range(blocks)
            for key in range(query + 1)
            if query - key >= 2
        )

    assert [size[path] for path in paths] == [remote(head) for head in range(8)]


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path):
    found = phireg.verify(converted("phi2"), source("phi2"), checks=("structure",))
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(found, tmp_path / "missing" / "out.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError):
        write_report(found, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command_passes_and_writes_the_page(tmp_path):
    page = tmp_path / "out.html"
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--report", page)
    assert ran.exit_code == 0
    assert " ".join(ran.stdout.split()).endswith(": verified")  # long paths are folded
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("place", "code"), [("typo/out.html", 2), (".", 6)])
def test_a_report_that_cannot_be_written_is_told_before_verifying(
    place, code, tmp_path, monkeypatch
):
    monkeypatch.setattr(phireg, "verify", None)
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--report", tmp_path / place)
    assert ran.exit_code == code
    assert "give --report another place" in ran.output or "give the name of a file" in ran.output
    assert list(tmp_path.iterdir()) == []


def test_the_command_fails_with_4_and_names_the_place(damaged):
    ran = run(damaged, "--model-dir", source("phi3-small"))
    assert ran.exit_code == 4
    assert "layer 1 attention" in ran.stdout
    assert "not verified" in ran.stdout
    assert max(map(len, ran.stdout.splitlines()[:-1])) <= 80


def test_quick_says_what_it_leaves_out():
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--quick")
    assert ran.exit_code == 0
    assert "not checked: logits, ranks" in " ".join(ran.stdout.split())


def test_a_directory_that_is_no_checkpoint(tmp_path):
    assert run(source("phi2"), "--model-dir", source("phi2")).exit_code == 3
    assert run(tmp_path / "none", "--model-dir", source("phi2")).exit_code == 3
