"""Quantized checkpoints against a forward pass written apart from the executor."""

import json

import pytest
import torch
from checkpoints_by_hand import (
    LINEARS,
    forward,
    plain_linear,
    quantized_cache,
    quantized_linear,
    random_ids,
    reference_logits,
    relative_error,
    write_checkpoint,
    written,
)
from helpers.tiny_models import phi2, phi3, phi3_small
from safetensors.torch import load_file

from phireg.executor import generate, load, quantized, stored
from phireg.executor.levels import Levels
from phireg.formats import FORMATS
from phireg.reader.storage import Storage

MODELS = {
    "phi2": (phi2, {"num_hidden_layers": 2}),
    "phi3": (phi3, {"num_hidden_layers": 2, "num_key_value_heads": 2}),
    "small": (phi3_small, {"num_hidden_layers": 2}),
}
SCHEMES = ("fp8", "int8_sq", "int8_wo", "int4_wo")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    make, changes = MODELS[request.param]
    return make(**changes)


def token_errors(actual, expected):
    """Relative error of every token's logits, sorted."""
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).sort().values


def assert_same(actual, expected):
    """A mistake moves every token.

    What is almost in the middle between two values of a grid may round to the other one in float64:
    that moves a token by a grid's step, and those that attend to it. It is rare.
    """
    errors = token_errors(actual, expected)
    assert errors[len(errors) // 5] < 1e-5
    assert errors[-1] < 0.3


def test_the_forward_pass_written_here_is_the_source_models(model, tmp_path):
    write_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "rank0.safetensors")
    ids = random_ids(model, 40)
    actual = forward(config, tensors, ids, plain_linear(tensors), lambda layer, x: x)
    assert relative_error(actual, reference_logits(model, ids[None])[0]) < 1e-5


@pytest.mark.parametrize(
    ("scheme", "kv", "ranks"),
    [
        *((scheme, None, 4) for scheme in SCHEMES),
        *((scheme, "fp8", 2) for scheme in (None, *SCHEMES)),
        *((scheme, "int8", 4) for scheme in (None, *SCHEMES)),
    ],
)
def test_logits(model, scheme, kv, ranks, tmp_path):
    ids = random_ids(model, 30)
    config, tensors = written(model, tmp_path, ids, scheme, kv, ranks)
    actual = {}
    for directory, count in ((tmp_path / "single", 1), (tmp_path, ranks)):
        linear = plain_linear(tensors)
        if scheme is not None:
            linear = quantized_linear(tensors, scheme, count)
        expected = forward(config, tensors, ids, linear, quantized_cache(tensors, kv))
        actual[count] = load(directory)(ids[None])[0]
        assert_same(actual[count], expected)
    if scheme not in ("int8_wo", "int4_wo"):
        assert_same(actual[ranks], actual[1])
    # what is tested is there: the quantized model is another one than the source
    assert token_errors(actual[1], reference_logits(model, ids[None])[0])[15] > 1e-3


@pytest.mark.parametrize(("scheme", "kv"), [("fp8", "fp8"), ("int8_sq", "int8")])
def test_values_beyond_the_scales_get_the_end_of_the_grid(model, scheme, kv, tmp_path):
    ids = random_ids(model, 30)
    config, tensors = written(model, tmp_path, ids, scheme, kv, 2, shrink=0.3)
    linear, cache = quantized_linear(tensors, scheme), quantized_cache(tensors, kv)
    assert_same(load(tmp_path)(ids[None])[0], forward(config, tensors, ids, linear, cache))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_checkpoints(scheme, tmp_path):
    """Computed in float32 they are what they say; in half precision near it."""
    model = phi3(num_hidden_layers=2, num_key_value_heads=4)
    ids = random_ids(model, 30)
    config, tensors = written(model, tmp_path, ids, scheme, "int8", 2, torch.bfloat16)
    linear, cache = quantized_linear(tensors, scheme, 2), quantized_cache(tensors, "int8")
    expected = forward(config, tensors, ids, linear, cache)
    assert_same(load(tmp_path, dtype="float32")(ids[None])[0], expected)
    executor = load(tmp_path)
    assert executor.dtype == torch.bfloat16
    # one step of e4m3 is 16 steps of bfloat16: their roundings go different ways now and then
    assert relative_error(executor(ids[None])[0], expected) < 0.3


@pytest.mark.parametrize(
    ("scheme", "kv", "offload"),
    [("fp8", "int8", False), ("int8_sq", "fp8", True), (None, "int8", False)],
)
def test_generation_is_the_forward_pass_token_for_token(model, scheme, kv, offload, tmp_path):
    prompts = [random_ids(model, n, seed=n).tolist() for n in (21, 14)]
    written(model, tmp_path, random_ids(model, 30), scheme, kv, 2)
    executor = load(tmp_path, offload=offload)
    tokens = generate(executor, prompts, 6)
    for prompt, new in zip(prompts, tokens, strict=True):
        logits = executor(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4, "too close to call: choose another seed"
        assert new == logits.argmax(-1).tolist()


@pytest.mark.parametrize("scheme", [None, "fp8", "int8_sq"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_inputs_of_linears_can_be_watched(model, scheme, ranks, tmp_path):
    """They are what comes before smoothing and rounding; of all ranks together."""
    ids = random_ids(model, 12)
    config, tensors = written(model, tmp_path, ids, scheme, None, ranks)
    expected, actual, outputs = {}, {}, []
    inner = quantized_linear(tensors, scheme) if scheme else plain_linear(tensors)

    def linear(name, x):
        expected[name] = x
        return inner(name, x)

    forward(config, tensors, ids, linear, lambda layer, x: x)
    load(tmp_path)(
        torch.stack([ids, ids.flip(0)]),
        lambda layer, what, x: outputs.append(what),
        lambda layer, name, x: actual.update({f"transformer.layers.{layer}.{name}": x}),
    )
    assert set(outputs) == {"embedding", "attention", "mlp", "hidden"}
    assert actual.keys() == expected.keys()
    assert len(actual) == config["num_hidden_layers"] * len(LINEARS)
    for name, value in actual.items():
        assert value.shape == (2, *expected[name].shape)
        assert_same(value[0], expected[name])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_kept_as_stored(scheme, tmp_path, monkeypatch):
    """The same function runs on a CPU; some linears have sizes its products of e4m3 do not take."""
    model = phi3(num_hidden_layers=2, num_key_value_heads=4)
    ids = random_ids(model, 30)
    written(model, tmp_path, ids, scheme, "fp8", 1, torch.bfloat16)
    expected = load(tmp_path)(ids[None])[0]
    monkeypatch.setattr(quantized, "keeps_levels", lambda device, grid: True)
    executor = load(tmp_path)
    kept = {name.rpartition(".")[2]: w for name, w in executor.layer_weights(0)[0].items()}
    grid, size = {
        "fp8": ("e4m3", 136), "int8_sq": ("int8", 136), "int8_wo": ("int8", 136),
        "int4_wo": ("int4", 512),
    }[scheme]  # fmt: skip
    # Of mlp.proj with its 136 inputs, or of a tile.
    assert (kept[grid].element_size(), kept[grid].shape[-1]) == (1, size)
    actual = executor(torch.stack([ids, ids]))
    tolerance = 0.2 if scheme == "fp8" else 0.0  # the same values, except for sums of products
    assert relative_error(actual[0], expected) <= tolerance
    assert relative_error(actual[1], expected) <= tolerance


@pytest.mark.parametrize(
    ("grid", "rows", "inputs", "group", "kept"),
    [
        ("e2m1", 32, 48, 16, True), ("e2m1", 48, 64, 16, False), ("e2m1", 32, 64, 32, False),
        ("int4", 64, 64, 32, True), ("int4", 32, 384, 192, True), ("int4", 32, 192, 96, False),
        ("int4", 32, 40, 0, True), ("int4", 40, 32, 0, False), ("int8", 3, 40, 0, True),
        ("int8", 32, 64, 32, False),
    ],
)  # fmt: skip
def test_weights_that_kernels_do_not_know_are_expanded(
    grid, rows, inputs, group, kept, monkeypatch
):
    monkeypatch.setattr(quantized, "keeps_levels", lambda device, grid: True)
    levels = torch.zeros(rows, inputs, dtype=torch.int8)
    groups = torch.ones(rows, inputs // group) if group else None
    weight = Levels(grid, levels, torch.ones(1), groups)
    assert quantized.keeps_weight(torch.device("cpu"), weight) == kept


@pytest.mark.parametrize("inputs", [64, 128])
@pytest.mark.parametrize("stacked", [False, True])
def test_nvfp4_as_files_have_it_is_kept(inputs, stacked, monkeypatch):
    """Two levels in a byte, a scale in e4m3 of each 16, and one of all, by the definition."""
    monkeypatch.setattr(quantized, "keeps_levels", lambda device, grid: True)
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat((magnitudes, -magnitudes)).double()
    experts, expected = [], []
    for number in range(2):
        codes = torch.randint(16, (32, inputs), generator=generator)
        groups = torch.rand(32, inputs // 16, generator=generator).to(torch.float8_e4m3fn)
        parts = {
            "weight": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
            "scale": groups, "second": torch.tensor(0.25 + number),
        }  # fmt: skip
        storage = Storage("trtllm", FORMATS["nvfp4"], "columns")
        experts.append([stored.stored_linear(storage, parts, inputs, None)])
        scale = groups.double().repeat_interleave(16, -1) * (0.25 + number)
        expected.append(table[codes] * scale)
    device, count = torch.device("cpu"), 2 if stacked else 1
    kept = stored.prepare("mlp.fc", experts[:count], stacked, device, torch.float32)
    assert kept["mlp.fc.group_scaling_factor"].dtype == torch.float8_e4m3fn
    for number, value in enumerate(expected[:count]):
        weights = quantized.of_expert(kept, number) if stacked else kept
        actual = quantized.weight_values(weights, "mlp.fc", inputs, torch.float32)
        assert torch.equal(actual.double(), value)
