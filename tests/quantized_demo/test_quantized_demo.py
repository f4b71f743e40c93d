"""What quantization may cost the demo models, and that ranks do not change it."""

import math

import pytest
import torch
from demo_script import script

from phireg.executor import load

FORMATS = script.FORMATS
ALLOWED = {"fp8": 0.02, "int8_sq": 0.05}
FEW = 4
MANY = 48  # a third of the split; the figures in docs/quantize.md are of all of it
FAMILIES = ("phi2", "phi3-mini", "phi3-small", "phi3-medium")
EXPERTS = ("phi3.5-moe", "fp8", "fp8")
# Every family and every format once more, in other pairs; benchmarks/quantize_demo.py has them all.
CASES = [(f, *formats) for f, formats in zip(FAMILIES, FORMATS[1:] + FORMATS[:1], strict=True)]
SOME_CASES = [*((f, *formats) for f, formats in zip(FAMILIES, FORMATS, strict=True)), EXPERTS]


def test_calibration_and_evaluation_share_no_text():
    model = script.demo.find("phi2")
    rows = script.token_rows(model, 0, script.EVALUATED)
    others = script.token_rows(model, script.EVALUATED, 160)
    assert len(rows) == 144
    assert len(others) == script.CALIBRATED
    assert not {tuple(row) for row in rows} & {tuple(row) for row in others}


def test_perplexity_by_hand():
    """Two texts over two tokens; the model always gives the odds 3 to 1 for token 0."""
    logits = torch.log(torch.tensor([0.75, 0.25]))
    score = script.score(lambda ids: logits.expand(ids.shape[1], 2), [[1, 0, 0], [0, 1]])
    assert score.perplexity == pytest.approx(math.exp(-(2 * math.log(0.75) + math.log(0.25)) / 3))
    assert score.best.tolist() == [0, 0, 0]


def check(measured, plain, family, qformat, cache, rows, top1):
    unquantized = plain(family, rows)
    quantized = measured(family, rows).quantized(qformat, cache)
    assert abs(quantized.perplexity / unquantized.perplexity - 1) < ALLOWED[qformat]
    assert quantized.agreement(unquantized) > top1
    return quantized


@pytest.mark.parametrize(("family", "qformat", "cache"), SOME_CASES)
def test_perplexity_on_some_texts(measured, plain, family, qformat, cache):
    check(measured, plain, family, qformat, cache, FEW, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "qformat", "cache"), CASES)
def test_perplexity_on_many_texts(measured, plain, family, qformat, cache):
    one = check(measured, plain, family, qformat, cache, MANY, 0.96)
    two = measured(family, MANY).quantized(qformat, cache, tp_size=2)
    assert two.perplexity == pytest.approx(one.perplexity, rel=1e-3)
    assert two.agreement(one) > 0.98


@pytest.mark.parametrize(("family", "qformat", "cache"), SOME_CASES)
def test_two_ranks_compute_what_one_computes(measured, family, qformat, cache, tmp_path):
    """In float64: in float32 a sum in another order turns a rounding to the grid now and then."""
    demo = measured(family, FEW)
    logits = []
    for tp_size in (1, 2):
        options = {"family": family, "qformat": qformat, "kv_cache_dtype": cache}
        plan = script.phireg.plan(demo.model.directory, tp_size=tp_size, **options)
        script.phireg.quantize(plan, tmp_path / str(tp_size), demo.statistics)
        executor = load(tmp_path / str(tp_size), dtype=torch.float64)
        logits.append(executor(torch.tensor([demo.rows[0]])))
    one, two = logits
    assert one.abs().max() > 1
    assert (two - one).norm() < 1e-6 * one.norm()
