"""What is measured, against the same numbers from plain torch and transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import phireg
from phireg import demo, executor
from phireg.calibration.settings import Settings
from phireg.calibration.statistics import Statistics
from phireg.errors import SourceError
from phireg.quality.run import measure

TP = 2
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
MODULES = {
    "attention.qkv": "self_attn.q_proj",
    "attention.dense": "self_attn.dense",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
}
"""Of phi-2: where transformers' model has the input of each linear."""


@pytest.fixture(scope="module")
def source():
    return demo.find("phi2").directory


@pytest.fixture(scope="module")
def ids(source, tmp_path_factory):
    """Nine rows of 40 ids, the first six of them for calibration."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(5, 1000, (9, 40), generator=generator).tolist()
    path = tmp_path_factory.mktemp("ids") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path, rows


@pytest.fixture(scope="module")
def settings(ids):
    return Settings(file=ids[0], size=6, device="cpu")


@pytest.fixture(scope="module")
def statistics(source, settings, tmp_path_factory):
    plan = phireg.plan(source, qformat="fp8")
    return phireg.calibrate(plan, tmp_path_factory.mktemp("stats") / "amax", settings).statistics


@pytest.fixture(scope="module")
def inputs(source, ids):
    """Of the rows that were not calibrated on: every linear's input, by hooks on the source."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen = {}

    def hook(key):
        def keep(_, arguments):
            seen.setdefault(key, []).append(arguments[0][0])

        return keep

    for index, layer in enumerate(model.model.layers):
        for linear, module in MODULES.items():
            layer.get_submodule(module).register_forward_pre_hook(hook((index, linear)))
    with torch.no_grad():
        for row in ids[1][6:]:
            model(input_ids=torch.tensor([row]), use_cache=False)
    return {key: torch.cat(parts) for key, parts in seen.items()}


@pytest.fixture(scope="module")
def checkpoints(source, settings, statistics, tmp_path_factory):
    """By format: the checkpoint and what was measured."""
    measured = {}
    for qformat, cache in (("fp8", None), ("int8_sq", "int8"), ("int4_wo", None)):
        plan = phireg.plan(source, qformat=qformat, kv_cache_dtype=cache, tp_size=TP)
        place = tmp_path_factory.mktemp("out") / qformat
        phireg.quantize(plan, place, statistics)
        measured[qformat] = place, measure(plan, place, settings, provenance=statistics.provenance)
    return measured


def linear_of(quality, layer, name):
    (linear,) = [x for x in quality.linears if (x.layer, x.linear) == (layer, name)]
    return linear


def together(place, layer, linear, part):
    """A companion of a linear, of all ranks."""
    ranks = [load_file(place / f"rank{rank}.safetensors") for rank in range(TP)]
    parts = [rank[f"transformer.layers.{layer}.{linear}.{part}"] for rank in ranks]
    row_linear = linear in ("attention.dense", "mlp.proj")
    if part == "weight":
        return torch.cat(parts, 1 if row_linear else 0)
    if part == "prequant_scaling_factor":
        return torch.cat(parts) if row_linear else parts[0]
    if part == "weights_scaling_factor" and len(parts[0]) > 1:
        return parts[0] if row_linear else torch.cat(parts)
    return parts[0]


def relative(actual, expected):
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
@pytest.mark.parametrize("linear", ["attention.dense", "mlp.fc", "mlp.proj"])
def test_the_weights_error_is_that_of_the_files(checkpoints, source, qformat, linear):
    place, quality = checkpoints[qformat]
    tensors = load_file(source / "model.safetensors")
    for layer in (0, 5):
        weight = together(place, layer, linear, "weight").float()
        scale = together(place, layer, linear, "weights_scaling_factor")
        expected = tensors[f"model.layers.{layer}.{MODULES[linear]}.weight"].float()
        if qformat == "int8_sq":
            scale = scale[:, None]
            expected = expected / together(place, layer, linear, "prequant_scaling_factor").float()
        error = linear_of(quality, layer, linear).weight
        assert error == pytest.approx(relative(weight * scale, expected), rel=1e-4)
        assert 0 < error < 0.05


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("linear", LINEARS)
def test_the_inputs_error_is_that_of_the_source_models_inputs(checkpoints, inputs, layer, linear):
    x = inputs[layer, linear]
    place, quality = checkpoints["fp8"]
    scale = together(place, layer, linear, "activation_scaling_factor")
    stored = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    measured = linear_of(quality, layer, linear)
    assert measured.activation == pytest.approx(relative(stored, x), rel=1e-3)
    channels = np.abs(x.numpy()).max(axis=0)
    assert measured.outliers == pytest.approx(channels.max() / np.median(channels), rel=1e-4)

    place, quality = checkpoints["int8_sq"]
    scale = together(place, layer, linear, "activation_scaling_factor")
    smoothed = x * together(place, layer, linear, "prequant_scaling_factor").float()
    stored = torch.round(smoothed / scale)
    measured = linear_of(quality, layer, linear)
    beyond = ((stored > 127) | (stored < -128)).float().mean()
    error = relative(stored.clamp(-128, 127) * scale, smoothed)
    assert measured.activation == pytest.approx(error, rel=1e-3)
    assert measured.saturation == pytest.approx(float(beyond), abs=2 / x.numel())


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int4_wo"])
def test_hidden_states_and_logits_are_those_of_two_whole_runs(
    checkpoints, source, ids, qformat, tmp_path
):
    place, quality = checkpoints[qformat]
    phireg.convert(phireg.plan(source), tmp_path / "plain")
    states = {}
    logits = {}
    for name, directory in (("plain", tmp_path / "plain"), ("quantized", place)):
        model = executor.load(directory, dtype=torch.float32)
        for number, row in enumerate(ids[1][6:]):

            def observe(layer, what, value, key=(name, number)):
                if what == "hidden":
                    states[(*key, layer)] = value[0]

            logits[name, number] = model(torch.tensor([row]), observe)[0]
    for layer, error in enumerate(quality.hidden):
        by_token = [
            (states["quantized", n, layer] - states["plain", n, layer]).norm(dim=-1)
            / states["plain", n, layer].norm(dim=-1)
            for n in range(3)
        ]
        assert error == pytest.approx(float(torch.cat(by_token).mean()), rel=1e-3)
    actual, expected = (
        torch.cat([logits[name, n] for n in range(3)]).log_softmax(-1)
        for name in ("quantized", "plain")
    )
    text = quality.text
    same = float((actual.argmax(-1) == expected.argmax(-1)).float().mean())
    assert text.top1.value == pytest.approx(same)
    kl = float((expected.exp() * (expected - actual)).sum(-1).mean())
    assert text.kl.value == pytest.approx(kl, rel=1e-2, abs=1e-6)
    chosen = [
        logits["quantized", n].log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])
        for n, row in enumerate(ids[1][6:])
    ]
    assert text.nll == pytest.approx(-float(torch.cat(chosen).mean()), rel=1e-5)
    assert (text.rows, text.tokens, text.calibrated) == (3, 120, False)
    assert quality.size == sum(file.stat().st_size for file in place.glob("rank*"))
    assert quality.unquantized_size == sum(phireg.plan(source, tp_size=TP).file_sizes)


def test_weights_alone(checkpoints):
    _, quality = checkpoints["int4_wo"]
    assert {linear.saturation for linear in quality.linears} == {None}
    assert 0.05 < linear_of(quality, 0, "mlp.fc").weight < 0.2


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
def test_nothing_saturates_on_what_was_calibrated_and_louder_text_does(
    source, ids, statistics, qformat, tmp_path
):
    plan = phireg.plan(source, qformat=qformat, dtype="float32")
    phireg.quantize(plan, tmp_path / "same", statistics)
    first = tmp_path / "first.jsonl"
    first.write_text("".join(ids[0].read_text().splitlines(keepends=True)[:6]))
    settings = Settings(file=first, device="cpu")
    quality = measure(plan, tmp_path / "same", settings, provenance=statistics.provenance)
    assert quality.text.calibrated
    assert {linear.saturation for linear in quality.linears} == {0.0}

    # As if the text had been four times as loud as what was calibrated on.
    quiet = Statistics(
        {name: amax / 4 for name, amax in statistics.inputs.items()}, (), (), statistics.provenance
    )
    phireg.quantize(plan, tmp_path / "quiet", quiet)
    loud = measure(plan, tmp_path / "quiet", settings, provenance=statistics.provenance)
    assert all(linear.saturation > 0 for linear in loud.linears)
    assert loud.hidden[-1] > 3 * quality.hidden[-1]


def test_nothing_to_measure_on(source, tmp_path):
    plan = phireg.plan(source, qformat="int8_wo")
    phireg.quantize(plan, tmp_path / "out", None)
    rows = tmp_path / "short.jsonl"
    rows.write_text('{"input_ids": [5]}\n')
    with pytest.raises(SourceError):
        measure(plan, tmp_path / "out", Settings(file=rows, device="cpu"))


def test_a_demo_model_is_measured_on_its_own_articles(source, statistics, tmp_path):
    """And both models write: what transformers' model writes, and what the files give."""
    plan = phireg.plan(source, qformat="fp8", dtype="float32")
    phireg.quantize(plan, tmp_path / "out", statistics)
    provenance = statistics.provenance
    quality = measure(plan, tmp_path / "out", Settings(device="cpu"), provenance=provenance)
    assert quality.verdict == "close"
    assert quality.text.unquantized_perplexity < 3
    assert not quality.text.calibrated
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    article = demo.find("phi2").articles[0]
    prompt = tokenizer(article.prompt, return_tensors="pt").input_ids
    row = model.generate(prompt, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :]
    written = quality.continuation
    assert written.before == tokenizer.decode(row, skip_special_tokens=True)
    assert written.after == demo.summarize(tmp_path / "out", [article])[0]
    # General text is not of its kind.
    other = measure(
        plan, tmp_path / "out", Settings(dataset="builtin", device="cpu"), provenance=provenance
    )
    assert other.verdict == "uninformative"
    assert f"{other.text.vocab_size:,}" in other.summary
