"""The page: whole, complete, self-contained, and nothing in a name is taken for markup."""

import re
from xml.etree import ElementTree

import pytest

from phireg.quality.result import LinearQuality, Quality, TextQuality
from phireg.report.quality import render_quality as render

NAMES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")


def quality(layers=3, *, inputs=True, nll=1.0):
    linears = tuple(
        LinearQuality(
            layer,
            name,
            0.01 * (1 + layer),
            0.02 * (1 + layer) if inputs else None,
            1e-4 * layer if inputs else None,
            4.0 + layer if layer else float("inf"),
        )
        for layer in range(layers)
        for name in NAMES
    )
    text = TextQuality("<b>text</b>.jsonl", 2, 300, False, 0.95, 0.01, nll, 1.0)
    return Quality(
        "/tmp/<i>ckpt", "phi3-mini", "fp8" if inputs else "int8_wo", "int8", "Phi3ForCausalLM",
        "bfloat16", 2, linears, tuple(0.01 * (n + 1) for n in range(layers)), text,
        (("text", "<u>300 tokens"),),
    )  # fmt: skip


def pictures(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


@pytest.mark.parametrize(("layers", "inputs", "maps"), [(3, True, 4), (40, True, 4), (3, False, 2)])
def test_every_linear_has_a_cell_on_every_map(layers, inputs, maps):
    charts = pictures(render(quality(layers, inputs=inputs)))
    assert len(charts) == maps + 1
    for picture in charts[:-1]:
        titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
        places = [title.partition(":")[0] for title in titles]
        assert sorted(places) == sorted(
            f"layer {layer} {name}" for layer in range(layers) for name in NAMES
        )
    dots = list(charts[-1].iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == layers


def test_the_verdict_without_markup_of_names():
    page = render(quality())
    assert "✓ close" in page
    assert not re.search(r"""<b>text|<i>ckpt|<u>|(src|href)=|url\(|@import""", page)
    page = render(quality(nll=1.1))
    assert "✗ not close" in page
    assert "perplexity 3.004 instead of 2.718" in page
