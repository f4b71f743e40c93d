"""The page of a verification: whole, self-contained, and nothing in a name is taken for markup."""

import re
from xml.etree import ElementTree

import pytest
from verify_sources import converted, copied, edit_config, source

import phireg
from phireg.errors import OutputError
from phireg.report.page import write_page
from phireg.report.verification import render_verification as render
from phireg.verification.result import CHECKS, Check, LogitsResult, PromptResult, Verification


def count(page, tag, class_):
    """Count the elements of a class in all charts of a page."""
    charts = [ElementTree.fromstring(x) for x in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    elements = [e for chart in charts for e in chart.iter(f"{{http://www.w3.org/2000/svg}}{tag}")]
    return sum(class_ in (element.get("class") or "").split() for element in elements)


def test_the_page_of_a_correct_checkpoint():
    page = render(phireg.verify(converted("phi3-small", 2), source("phi3-small")))
    assert "✓ verified" in page
    assert count(page, "path", "attention") == count(page, "path", "mlp") == 3
    assert count(page, "path", "end-part") == 3
    assert count(page, "path", "wrong") == 0
    # Copies of rows are no rounding: the embedding's error is none, and is called so.
    assert "embedding: 0 (exact)" in page
    assert count(page, "path", "stripe") == 8  # one picture for each head of the whole model
    assert "head 7 · rank 1" in page
    assert not re.search(r"(src|href)=|@import|url\(|<script", page)


def test_the_page_of_a_wrong_one_says_where(damaged):
    page = render(phireg.verify(damaged, source("phi3-small")))
    assert "✗ does not match the source" in page
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;checkpoint" in page
    assert count(page, "path", "wrong") == 1
    assert "The first wrong part: layer 1 attention" in page
    assert "still grouped by KV head" in page


def shaded(page):
    """The parts whose dot is in the tinted area, by the numbers in the page's drawing."""
    drawing = re.search(r"<svg.*?</svg>", page, re.DOTALL)[0]
    areas = [
        tuple(map(float, area))
        for area in re.findall(r'd="M(\S+) 0H(\S+)V(\S+)H\S+z" class="over"', drawing)
    ]
    dots = re.findall(r'd="M(\S+) (\S+)h0" class="dot ([^"]*)"><title>([^:<]+):', drawing)
    return {
        title
        for x, y, _, title in dots
        if any(left <= float(x) <= right and float(y) < limit for left, right, limit in areas)
    }


@pytest.mark.parametrize(
    ("quantized", "wrong"),
    [(("attention", "mlp"), ()), (("attention",), ()), (("attention", "mlp"), ((1, "mlp"),))],
)
def test_what_is_shaded_is_what_is_wrong(quantized, wrong):
    """Quantized parts are off by 5 %, others by 1e-6; each has its own tolerance."""
    places = [(None, "embedding"), *((n, p) for n in range(3) for p in ("attention", "mlp"))]
    places += [(None, "final norm"), (None, "lm_head")]
    logits = LogitsResult(
        (PromptResult(4, "short", 0.1, 0.05, 0.01, 1.0, 0, (0.05,) * 4),),
        tuple(
            (place, 0.9 if place in wrong else 0.05 if place[1] in quantized else 1e-6)
            for place in places
        ),
        (0.05,) * 3, 1e-4, 1.0, (), 0, "cpu", "float32", quantized, 0.35, 1.0,
    )  # fmt: skip
    verdict = "failed" if wrong else "passed"
    checks = tuple(Check(name, verdict, "") for name in CHECKS)
    page = render(Verification("c", "m", "phi2", {}, checks, logits))
    assert shaded(page) == {f"layer {layer} {part}" for layer, part in wrong}
    assert f'class="verdict {"bad" if wrong else "good"}"' in page


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
