"""The page of a verification: whole, self-contained, and nothing in a name is taken for markup."""

import re
from xml.etree import ElementTree

import pytest
from verify_sources import converted, copied, edit_config, source

import phireg
from phireg.errors import OutputError
from phireg.report.page import write_page
from phireg.report.verification import render_verification as render


def count(page, tag, class_):
    """Count the elements of a class in all charts of a page."""
    charts = [ElementTree.fromstring(x) for x in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    elements = [e for chart in charts for e in chart.iter(f"{{http://www.w3.org/2000/svg}}{tag}")]
    return sum(class_ in (element.get("class") or "").split() for element in elements)


def test_the_page_of_a_correct_checkpoint():
    page = render(phireg.verify(converted("phi3-small", 2), source("phi3-small")))
    assert "✓ verified" in page
    assert count(page, "circle", "attention") == count(page, "circle", "mlp") == 3
    assert count(page, "circle", "end-part") == 3
    assert count(page, "circle", "wrong") == 0
    assert count(page, "path", "stripe") == 8  # one picture for each head of the whole model
    assert "head 7 · rank 1" in page
    assert not re.search(r"(src|href)=|@import|url\(|<script", page)


def test_the_page_of_a_wrong_one_says_where(damaged):
    page = render(phireg.verify(damaged, source("phi3-small")))
    assert "✗ does not match the source" in page
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;checkpoint" in page
    assert count(page, "circle", "wrong") == 1
    assert "first: layer 1 attention" in page
    assert "still grouped by KV head" in page


def test_nothing_in_a_checkpoint_reaches_the_page_unescaped(tmp_path):
    directory = copied("phi2", 1, tmp_path / "c")
    mark = "<script>alert(1)</script>\"'"
    edit_config(directory, lambda config: config.update({mark: 1, "hidden_act": mark}))
    page = render(phireg.verify(directory, source("phi2")))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert count(page, "path", "cell") == 0  # no layer is block-sparse


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
