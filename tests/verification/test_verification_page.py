"""The page of a verification: whole, self-contained, and nothing in a name is taken for markup."""

import html.parser
import re

import pytest
from planted import PLANTED
from verify_sources import converted, copied, edit_config, source

import phireg
from phireg.errors import OutputError
from phireg.report.page import write_page
from phireg.report.verification import render_verification as render

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
    assert "✗ does not match the source" in text
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


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError):
        write_page("text", tmp_path / "taken")
    write_page("text", tmp_path / "out.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "taken"]
