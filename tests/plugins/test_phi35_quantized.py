"""Phi-3.5-MoE in FP8: what calibration sees of experts, and their scales and values."""

import copy
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from helpers.command_line import run_phireg
from phireg_plugins.phi35_moe import FAMILY
from safetensors.torch import load_file, save_file
from test_phi35_verified import SIZES
from torch.nn import functional

import phireg
from phireg import demo, executor
from phireg.calibration.collect import collect
from phireg.calibration.settings import Settings
from phireg.calibration.statistics import Statistics
from phireg.reference.load import open_reference
from phireg.testing import write_tiny_model

EXPERTS, IDLE = SIZES["num_local_experts"], 4
MOE = "model.layers.{}.block_sparse_moe"
ROWS = [[5, 9, 13, 40, 2, 77, 21], [3, 3, 8], [60, 61, 62, 63, 64, 65]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose last layer never chooses one of the experts."""
    directory = tmp_path_factory.mktemp("source")
    write_tiny_model(FAMILY, SIZES, directory)
    tensors = load_file(directory / "model.safetensors")
    layer = MOE.format(SIZES["num_hidden_layers"] - 1)
    tensors[f"{layer}.gate.weight"][IDLE] = 0
    tensors["model.layers.1.post_attention_layernorm.bias"].fill_(1)  # tokens point one way,
    for expert in {0, 1, 2}:  # and three routers the same
        tensors[f"{layer}.gate.weight"][expert] += 1
    save_file(tensors, directory / "model.safetensors")
    return directory


def opened(directory):
    return open_reference(
        FAMILY, directory, weights=None, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.fixture(scope="module")
def statistics(source):
    return collect(opened(source), ROWS, device=torch.device("cpu"))


def test_maxima_of_each_experts_own_tokens(source, statistics):
    """Worked out token by token from the scores; an expert without tokens has zeros."""
    reference = opened(source)
    reference.keep_all()
    model, tensors = reference.model, load_file(source / "model.safetensors")
    expected = {}

    def look(index):
        name = MOE.format(index)

        def hook(_, arguments):
            for token in arguments[0].reshape(-1, SIZES["hidden_size"]):
                scores = tensors[f"{name}.gate.weight"] @ token
                for expert in scores.topk(2).indices.tolist():
                    w1, w3 = (tensors[f"{name}.experts.{expert}.{w}.weight"] for w in ("w1", "w3"))
                    inner = torch.nn.functional.silu(w1 @ token) * (w3 @ token)
                    for w, value in (("w1", token), ("w3", token), ("w2", inner)):
                        key = f"{name}.experts.{expert}.{w}"
                        before = expected.get(key, torch.zeros_like(value))
                        expected[key] = torch.maximum(before, value.abs())

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.block_sparse_moe.register_forward_pre_hook(look(index))
    for row in ROWS:
        reference.logits(torch.tensor([row]))
    names = {name for name in statistics.inputs if ".experts." in name}
    assert len(names) == 2 * EXPERTS * 3 and expected.keys() < names
    for name in names:
        if name in expected:
            assert torch.allclose(torch.tensor(statistics.inputs[name]), expected[name], rtol=1e-4)
        else:
            assert not statistics.inputs[name].any()
    idle = {f"{MOE.format(1)}.experts.{IDLE}.{w}" for w in ("w1", "w2", "w3")}
    assert idle <= names - expected.keys()


SPREADS = [(1, None), (2, None), (2, 2), (4, 2)]
"""tp_size and moe_ep_size."""
LAST = f"transformer.layers.{SIZES['num_hidden_layers'] - 1}.mlp"


@pytest.fixture(scope="module")
def converted(source, statistics, tmp_path_factory):
    """Checkpoints by spread: (directory, findings)."""

    @cache
    def convert(tp_size, ep_size):
        plan = phireg.plan(
            source, qformat="fp8", tp_size=tp_size, moe_ep_size=ep_size, dtype="float32"
        )
        output = tmp_path_factory.mktemp("out") / "ckpt"
        return output, phireg.quantize(plan, output, statistics).findings

    return convert


def e4m3(x, scale):
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize(("tp_size", "ep_size"), SPREADS)
def test_every_scale_and_value(tp_size, ep_size, source, statistics, converted):
    """What TensorRT-LLM's MixtureOfExperts reads: a scale per expert, one for all their inputs."""
    old, shares = load_file(source / "model.safetensors"), ep_size or 1
    directory, _ = converted(tp_size, ep_size)
    for rank in range(tp_size):
        new = load_file(directory / f"rank{rank}.safetensors")
        part, parts = rank // shares, tp_size // shares
        own = range(rank % shares * EXPERTS // shares, (rank % shares + 1) * EXPERTS // shares)
        for layer in range(SIZES["num_hidden_layers"]):
            moe, mlp = MOE.format(layer), f"transformer.layers.{layer}.mlp"
            for name, sources in (("fc", ("w3", "w1")), ("proj", ("w2",))):
                inputs = [f"{moe}.experts.{e}.{w}" for e in range(EXPERTS) for w in sources]
                largest = max(float(statistics.inputs[module].max()) for module in inputs)
                stored = new[f"{mlp}.{name}.activation_scaling_factor"]
                assert stored.tolist() == [pytest.approx(largest / 448, rel=1e-6)]
                scales = new[f"{mlp}.{name}.weights_scaling_factor"]
                assert scales.shape == (len(own), 1) and scales.dtype == torch.float32
                for index, expert in enumerate(own):
                    weights = [old[f"{moe}.experts.{expert}.{w}.weight"] for w in sources]
                    scale = torch.stack([w.abs().max() for w in weights]).max() / 448
                    assert float(scales[index]) == pytest.approx(float(scale), rel=1e-6)
                    axis = 0 if name == "fc" else 1
                    cut = torch.cat([w.chunk(parts, axis)[part] for w in weights])
                    actual = new[f"{mlp}.{name}.weight"][index]
                    assert torch.equal(actual.float(), e4m3(cut, scales[index]))
            assert new[f"{mlp}.router.weight"].dtype == torch.float32


@pytest.mark.parametrize("keeps", [False, True], ids=["expanded", "as stored"])
def test_the_executor_computes_with_them(keeps, converted, monkeypatch):
    """One layer's experts by hand: inputs and weights on the grid, scales of the checkpoint.

    A GPU keeps the weights as they are stored.
    """
    monkeypatch.setattr(executor.quantized, "keeps_levels", lambda device, grid: keeps)
    directory, _ = converted(1, None)
    tensors = load_file(directory / "rank0.safetensors")
    x = torch.randn(1, 9, SIZES["hidden_size"], generator=torch.Generator().manual_seed(2))
    model = executor.load(directory, dtype="float32")
    weights = model.layer_weights(SIZES["num_hidden_layers"] - 1)
    actual = executor.blocks.mixture(model.spec, weights, model.ranks, x, model.reduce)[0]

    def product(name, expert, x):
        scale = tensors[f"{LAST}.{name}.activation_scaling_factor"]
        weight = tensors[f"{LAST}.{name}.weight"][expert].float()
        both = scale * tensors[f"{LAST}.{name}.weights_scaling_factor"][expert]
        return e4m3(x, scale) @ weight.T * both

    chosen, shares = executor.blocks.route(x[0] @ tensors[f"{LAST}.router.weight"].T, 0.3)
    for token in range(9):
        expected = torch.zeros(SIZES["hidden_size"])
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            up, gate = product("fc", expert, x[0, token]).chunk(2)
            expected += share * product("proj", expert, functional.silu(gate) * up)
        assert torch.allclose(actual[token], expected, atol=1e-4)


def test_ranks_compute_the_same(converted):
    ids = torch.tensor([ROWS[0]])
    expected = executor.load(converted(1, None)[0], dtype="float32")(ids)
    for spread in SPREADS[1:]:
        logits = executor.load(converted(*spread)[0], dtype="float32")(ids)
        assert (logits - expected).norm() < 0.05 * expected.norm()  # a rounding turns now and then


@pytest.mark.parametrize("spread", [(1, None), (4, 2)])
def test_verify_passes(spread, source, converted):
    verification = phireg.verify(converted(*spread)[0], source)
    assert verification.passed, verification


def exchanged(name):
    def change(tensors):
        tensors[name] = tensors[name][[1, 0, *range(2, len(tensors[name]))]]

    return change


def other_halves(tensors):
    weight = tensors[f"{LAST}.fc.weight"]
    weight[2] = weight[2].roll(SIZES["intermediate_size"], 0)


MISTAKES = {
    "scales of two experts": (exchanged(f"{LAST}.fc.weights_scaling_factor"), "mlp.fc"),
    "two experts": (exchanged(f"{LAST}.proj.weight"), "mlp.proj.weight"),
    "up and gate of one expert": (other_halves, "mlp.fc.weight"),
    "one scale for all": (
        lambda tensors: tensors[f"{LAST}.fc.weights_scaling_factor"].fill_(1.0),
        "mlp.fc",
    ),
    "another router": (exchanged(f"{LAST}.router.weight"), "mlp.router"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_finds(mistake, source, converted, tmp_path):
    change, place = MISTAKES[mistake]
    directory = tmp_path / "ckpt"
    shutil.copytree(converted(1, None)[0], directory)
    (directory / "phireg.json").unlink()  # as a checkpoint of others
    tensors = load_file(directory / "rank0.safetensors")
    change(tensors)
    save_file(tensors, directory / "rank0.safetensors")
    verification = phireg.verify(directory, source, family="phi3.5-moe", checks=("weights",))
    problems = [problem for check in verification.checks for problem in check.problems]
    assert not verification.passed
    assert any(place in problem.where and "layers.1" in problem.where for problem in problems)


def test_idle_experts_are_named_and_have_the_others_maxima(statistics, converted):
    inputs, idle = statistics.of_experts()
    names = [f"{MOE.format(1)}.experts.{IDLE}.{w}" for w in ("w1", "w2", "w3")]
    assert set(names) <= set(idle)
    for name in names:
        others = [name.replace(f".{IDLE}.", f".{e}.") for e in range(EXPERTS)]
        expected = np.maximum.reduce([statistics.inputs[other] for other in others])
        assert np.array_equal(inputs[name], expected) and expected.any()
    busy = statistics.inputs.keys() - set(idle)
    assert all(inputs[name] is statistics.inputs[name] for name in busy)
    _, findings = converted(1, None)
    warned = {f.subject for f in findings if f.code == "unseen"}
    assert warned == {name.rpartition(".")[0] for name in idle}


def test_a_linear_of_no_expert_is_not_filled():
    """Two layers are no siblings."""
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    statistics = Statistics(
        {"model.layers.0.mlp.down_proj": zero, "model.layers.1.mlp.down_proj": one}, (), (), {}
    )
    inputs, idle = statistics.of_experts()
    assert idle == () and not inputs["model.layers.0.mlp.down_proj"].any()


def test_explain_speaks_of_each_expert(source):
    done = run_phireg("explain", source, f"{LAST}.fc", "--qformat", "fp8")
    assert done.exit_code == 0, done.output
    assert f"for each of {EXPERTS} experts" in done.stdout
    assert "experts.0.w3.weight" in done.stdout and "experts.1.w3.weight / 448" not in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("qformat", [None, "fp8"])
def test_on_a_gpu(qformat, tmp_path):
    """The demo model, its calibration and its experts; in FP8 the GPU multiplies e4m3 values."""
    model = demo.find("phi3.5-moe")
    plan = phireg.plan(model.directory, family=model.family, qformat=qformat)
    if qformat is None:
        phireg.convert(plan, tmp_path / "ckpt")
    else:
        settings = Settings(file=model.directory / "heldback.jsonl", size=16, device="cuda")
        phireg.quantize(plan, tmp_path / "ckpt", settings=settings)
    prompts = [[5, 300, 17, 411, 8, 90, 33], [700, 701, 3]]
    on_cpu = executor.load(tmp_path / "ckpt", dtype="float32")
    on_gpu = executor.load(tmp_path / "ckpt", device="cuda")
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected, actual = on_cpu(ids), on_gpu(ids.cuda()).cpu()
        assert (actual - expected).norm() < 0.3 * expected.norm()  # a token may change experts
    assert phireg.verify(tmp_path / "ckpt", model.directory, device="cuda").passed
    rows = executor.generate(on_gpu, prompts, 8)
    assert [len(row) for row in rows] == [8, 8]


def test_the_scales_are_modelopts(source, converted):
    """What its exporter of TensorRT-LLM checkpoints stacks of the model that it calibrated."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export.layer_utils import build_stacked_experts

    reference = opened(source)
    reference.keep_all()

    def calibrate(model):
        for row in ROWS:
            model(torch.tensor([row]), use_cache=False)

    with torch.no_grad():
        model = quantization.quantize(
            reference.model, copy.deepcopy(quantization.FP8_DEFAULT_CFG), calibrate
        )
    ours = load_file(converted(1, None)[0] / "rank0.safetensors")
    for number, layer in enumerate(model.model.layers):
        experts = layer.block_sparse_moe.experts
        for linear in (getattr(expert, w) for expert in experts for w in ("w1", "w2", "w3")):
            if linear.input_quantizer.amax is None:
                # 0.47 would take the largest input of any expert's w1, w2 or w3 for it, and then
                # for all of them.
                linear.input_quantizer.amax = torch.tensor(1e-9)
        stacks = build_stacked_experts(
            experts, ["w1", "w2", "w3"], EXPERTS, lambda e, n, name: getattr(e[n], name)
        )
        for name, theirs in zip(("fc", "proj"), stacks, strict=True):
            prefix = f"transformer.layers.{number}.mlp.{name}"
            scales = ours[f"{prefix}.weights_scaling_factor"]
            assert torch.equal(scales.ravel(), theirs.weights_scaling_factor.ravel())
            inputs = ours[f"{prefix}.activation_scaling_factor"]
            assert torch.equal(inputs, theirs.activation_scaling_factor)
            weight = e4m3(theirs.weight, scales[..., None])
            assert torch.equal(ours[f"{prefix}.weight"].float(), weight)
