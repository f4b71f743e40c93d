"""Models whose hidden states are no numbers: every backend and verdict says so, and where."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.command_line import run_phireg
from helpers.tiny_models import phi2
from helpers.tokenized_models import chat_tokenizer, converted, save
from safetensors.numpy import load_file, save_file

import phireg
from phireg.calibration.settings import Settings
from phireg.errors import CheckError, SourceError
from phireg.executor import Sampling
from phireg.executor.finite import NotFiniteError
from phireg.generation.backend import Options, Request, open_backend
from phireg.quality.run import measure

pytestmark = pytest.mark.hostile("values that are no numbers")

NAN = "model.layers.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A phi-2 that passes float16's largest value in its first MLP, and one with NaN and Inf."""
    root, made = tmp_path_factory.mktemp("numbers"), {}
    for name in ("overflow", "nan"):
        model = phi2(vocab_size=320)
        with torch.no_grad():
            if name == "overflow":
                for layer in model.model.layers:
                    layer.mlp.fc2.weight.mul_(3e4)
            else:
                weight = model.get_parameter(NAN)
                weight[3, 4], weight[7, :2], weight[0, 0] = math.nan, math.inf, -math.inf
        tokenizer = chat_tokenizer(special=("<|endoftext|>",), template=None)
        source = save(model, root / name, tokenizer)
        made[name] = (source, converted(source, root / f"{name}-ckpt"))
    return made


CASES = [("overflow", "float16"), ("nan", "float32")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("backend", ["executor", "hf"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "drawn"])
def test_no_text_comes_of_it(name, dtype, backend, sampling, places):
    place = places[name][backend == "executor"]
    options = Options("cpu", dtype)
    with pytest.raises(NotFiniteError, match=f"prompt 1: .* {dtype}") as caught:
        phireg.generate(
            place, ["ab", [1, 2, 3]], backend=backend, sampling=sampling, options=options
        )
    assert (caught.value.position, bool(caught.value.hint)) == (2, True)
    with open_backend(backend, place, options) as model, pytest.raises(NotFiniteError):
        model.mean_nll([[1, 2]], [[3, 4]])


@pytest.mark.parametrize("backend", ["executor", "hf"])
def test_a_wider_range_makes_a_text_of_it(backend, places):
    place = places["overflow"][backend == "executor"]
    texts = {
        phireg.generate(place, [[1, 2]], backend=backend, sampling=how, max_new_tokens=3)[0].tokens
        for how in (Sampling(), Sampling(1e-46), Sampling(1e-40))
    }
    assert len(texts) == 1


def test_a_row_that_has_ended_is_left_alone(places):
    """Its first token is a stop id; what the model makes of it afterwards does not matter."""
    source = places["overflow"][0]
    (free,) = phireg.generate(source, [[1, 2]], backend="hf", max_new_tokens=1)
    with open_backend("hf", source, Options("cpu", "float32")) as model:
        with torch.no_grad():
            model.model.model.embed_tokens.weight[list(free.tokens)] = math.nan
        request = Request([[1, 2], [5, 6]], 4, free.tokens, Sampling())
        rows = model.generate(request)
    assert rows[0] == []


def test_beams(places):
    with open_backend("hf", places["nan"][0]) as model, pytest.raises(NotFiniteError):
        model.generate(Request([[1, 2], [3]], 3, (), Sampling(), num_beams=2))


def test_summaries_and_their_perplexity(places, tmp_path):
    articles = tmp_path / "a.jsonl"
    articles.write_text(json.dumps({"article": "The engine reads.", "highlights": "It reads."}))
    result = run_phireg(
        "summarize", places["overflow"][1], "--data-type", "float16", "--dataset", articles,
        "--device", "cpu", "--eval-ppl",
    )  # fmt: skip
    assert result.exit_code == 4
    assert "a.jsonl:1: " in result.stderr and "float16" in result.stderr


@pytest.mark.parametrize(
    ("name", "dtype", "where"),
    [("overflow", "float16", "layer 0 mlp"), ("nan", "float32", "layer 1 mlp")],
)
def test_verify_fails_at_the_layer(name, dtype, where, places):
    source, checkpoint = places[name]
    checked = phireg.verify(checkpoint, source, checks=["logits"], dtype=dtype, device="cpu")
    (problem,) = checked.check("logits").problems
    assert (problem.where, checked.passed) == (where, False)
    assert dtype in problem.text
    assert phireg.verify(checkpoint, source, checks=["weights"]).passed


def test_ranks_are_not_blamed(places, tmp_path):
    checkpoint = converted(places["nan"][0], tmp_path / "tp2", tp_size=2)
    checked = phireg.verify(checkpoint, places["nan"][0], checks=["ranks"], device="cpu")
    (problem,) = checked.check("ranks").problems
    assert problem.where == "layer 1 mlp" and "not finite" in problem.text


def test_the_logits_of_one_head_row(places, tmp_path):
    """A column of NaN is no suppressed token."""
    model = phi2(vocab_size=320)
    with torch.no_grad():
        model.lm_head.weight[9, 3] = math.nan
    source = save(model, tmp_path / "source")
    checkpoint = converted(source, tmp_path / "ckpt")
    checked = phireg.verify(checkpoint, source, checks=["logits"], device="cpu")
    assert checked.check("logits").problems[0].where == "lm_head"


def test_convert_counts_and_warns(places, tmp_path):
    source = places["nan"][0]
    result = run_phireg("convert", "--model-dir", source, "--output-dir", tmp_path / "a", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert list(document["losses"]) == [NAN]
    assert (document["losses"][NAN]["nan"], document["losses"][NAN]["infinite"]) == (1, 3)
    result = run_phireg("convert", "--model-dir", source, "--output-dir", tmp_path / "b")
    assert "1 value" in result.output and "3 values" in result.output and NAN in result.output


def test_calibration_and_measurement(places, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [n, n + 1, 5]}) + "\n" for n in range(9)))
    settings = Settings(file=rows, device="cpu")
    source = places["nan"][0]
    with pytest.raises(SourceError, match=r"layers\.1\..*float32"):
        phireg.quantize(phireg.plan(source, qformat="fp8"), tmp_path / "q", settings=settings)
    plan = phireg.plan(places["overflow"][0], qformat="int8_wo", dtype="float32")
    phireg.quantize(plan, tmp_path / "sound", settings=settings)
    path = tmp_path / "sound" / "rank0.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.weight"][2] = np.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckError, match="quantized model, sample 1"):
        measure(plan, tmp_path / "sound", settings)
