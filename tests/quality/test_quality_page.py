"""The page: whole, complete, self-contained, and nothing in a name is taken for markup."""

import math
import re
from xml.etree import ElementTree

import pytest
from quality.results import NAMES, made

from phireg.quality.estimates import Estimate
from phireg.report.quality import render_quality as render


def maps(page):
    """The titles of every map's cells."""
    return [
        re.findall(r'<i class="heat\d" title="([^"]*)"', block)
        for block in re.findall(r'<div class="map.*?</div>', page, re.DOTALL)
    ]


@pytest.mark.parametrize(
    ("layers", "inputs", "count"), [(3, True, 4), (40, True, 4), (3, False, 2)]
)
def test_every_linear_has_a_cell_on_every_map(layers, inputs, count):
    page = render(made(layers, inputs=inputs))
    assert len(maps(page)) == count
    for titles in maps(page):
        places = [title.partition(":")[0] for title in titles]
        assert sorted(places) == sorted(
            f"layer {layer} {name}" for layer in range(layers) for name in NAMES
        )
    (plot,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    dots = ElementTree.fromstring(plot).iter("{http://www.w3.org/2000/svg}path")
    assert sum("state" in (dot.get("class") or "") for dot in dots) == layers


def test_maps_of_one_color_are_folded():
    page = render(made(flat=True))
    folded = re.findall(r'<details class="fold"><summary><b>(\w+)</b>: (.*?)</summary>', page)
    assert dict(folded) == {
        "Weight": "40.0 dB everywhere",
        "Input": "40.0 dB everywhere",
        "Saturation": "0 everywhere",
        "Outliers": "1x everywhere",
    }
    assert '<details class="fold">' not in render(made())


def test_no_markup_of_names_and_nothing_is_fetched():
    page = render(
        made(origin="<b>text</b>.jsonl"), [("command", "phireg <i>x"), ("duration", "3 s")]
    )
    assert not re.search(r"""<b>text|<i>ckpt|<i>x|<u>|<s>Once|(src|href)=|url\(|@import""", page)
    assert "phireg &lt;i&gt;x" in page
    assert "upon &lt;b&gt;a&lt;/b&gt; time" in page
    assert "2 MB → 1 MB" in page


@pytest.mark.parametrize(
    ("numbers", "color", "word"),
    [
        ({}, "good", "✓ close"),
        ({"kl": Estimate(0.2, 0.19, 0.21)}, "part", "! noticeably changed"),
        ({"kl": Estimate(2, 1.9, 2.1)}, "bad", "✗ far"),
        ({"kl": Estimate(0.05, 0.01, 0.2)}, "open", "? not enough text"),
        ({"unquantized_nll": math.log(2000)}, "open", "? this text tells nothing"),
    ],
)
def test_the_color_is_the_verdicts(numbers, color, word):
    page = render(made(**numbers))
    (state, words) = re.search(r'class="verdict (\w+)">\s*<p class="word">([^<]*)<', page).groups()
    assert state == color
    assert words.startswith(word)
