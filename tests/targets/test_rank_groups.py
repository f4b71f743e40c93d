"""Formats with groups in rank files: ModelOpt's own bytes, one meaning on any number of ranks."""

import copy
import warnings

import pytest
import torch
from helpers import exports, tiny_models
from safetensors.torch import load_file, save_file

import phireg
from phireg import registry
from phireg.calibration.collect import collect
from phireg.errors import UsageError
from phireg.executor import load, quantized
from phireg.reference.load import open_reference

CPU = torch.device("cpu")
SIZES = {"hidden_size": 256, "num_hidden_layers": 2}
MODELS = {
    "phi3": ("phi3-mini", tiny_models.phi3, {"num_key_value_heads": 4, "intermediate_size": 512}),
    "phi2": ("phi2", tiny_models.phi2, {"partial_rotary_factor": 0.5, "intermediate_size": 512}),
    "small": ("phi3-small", tiny_models.phi3_small, {"ff_intermediate_size": 512}),
}


class Model:
    """A source of which statistics are known."""

    def __init__(self, name, root):
        self.family, make, sizes = MODELS[name]
        self.source = root / name
        make(**SIZES, **sizes).to(torch.bfloat16).save_pretrained(self.source)
        reference = open_reference(
            registry.load(self.family).family,
            self.source,
            weights=None,
            dtype=torch.bfloat16,
            device=CPU,
        )
        rows = [row.tolist() for row in exports.rows()]
        self.statistics = collect(reference, rows, device=CPU, search=True)

    def quantize(self, out, qformat, **options):
        plan = phireg.plan(self.source, family=self.family, qformat=qformat, **options)
        phireg.quantize(plan, out, self.statistics)
        return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, known = tmp_path_factory.mktemp("groups"), {}

    def model(name):
        if name not in known:
            known[name] = Model(name, root)
        return known[name]

    return model


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    root, known = tmp_path_factory.mktemp("written"), {}

    def write(name, qformat, **options):
        key = (name, qformat, *options.items())
        if key not in known:
            out = root / str(len(known))
            known[key] = models(name).quantize(out, qformat, **options)
        return known[key]

    return write


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist()


def modelopts(model, qformat, out, tp_size, monkeypatch):
    """ModelOpt's TensorRT-LLM export; it refuses to write Phi-3's config.json, not its tensors."""
    import modelopt.torch.export.model_config_export as writer
    import modelopt.torch.quantization as mtq

    def config(made, *_, **__):
        mapping = {"tp_size": tp_size, "pp_size": 1, "world_size": tp_size}
        return {"rank": made.rank, "decoder": "", "mapping": mapping, "quantization": {}}

    monkeypatch.setattr(writer, "convert_to_tensorrt_llm_config", config)
    theirs = tiny_models.AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.bfloat16)
    settings = copy.deepcopy(getattr(mtq, exports.MODELOPT[qformat]))
    kind = {"phi2": "phi"}.get(model.family, "phi3")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = mtq.quantize(
            theirs.eval(), settings, lambda inner: [inner(row[None]) for row in exports.rows()]
        )
        writer.export_tensorrt_llm_checkpoint(
            theirs, kind, torch.bfloat16, out, inference_tensor_parallel=tp_size
        )
    return out


@pytest.mark.skipif(tiny_models.FOUR, reason="ModelOpt needs a newer transformers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "qformat", "tp_size"),
    [
        ("phi3", "int4_awq", 1),
        ("phi3", "w4a8_awq", 1),
        ("phi3", "int4_awq", 2),
        ("phi2", "nvfp4", 2),
    ],
)
def test_rank_files_are_modelopts_byte_for_byte(
    tmp_path, models, written, monkeypatch, name, qformat, tp_size
):
    theirs = modelopts(models(name), qformat, tmp_path / "theirs", tp_size, monkeypatch)
    ours = written(name, qformat, tp_size=tp_size)
    for rank in range(tp_size):
        expected, actual = (load_file(d / f"rank{rank}.safetensors") for d in (theirs, ours))
        assert actual.keys() == expected.keys()
        for tensor, value in actual.items():
            if "vocab_embedding" in tensor or "lm_head" in tensor:
                continue  # ModelOpt fills the vocabulary up
            if tp_size > 1 and name == "phi3" and ".mlp.fc." in tensor:
                continue  # ModelOpt cuts the fused gate and up in two: all of one to each rank
            assert bits(value) == bits(expected[tensor]), tensor


@pytest.mark.parametrize(
    ("name", "qformat"),
    [("phi3", "int4_awq"), ("small", "nvfp4"), ("small", "w4a8_awq"), ("phi2", "nvfp4")],
)
def test_ranks_mean_what_the_directory_does(tmp_path, models, written, name, qformat):
    """Two readers with layouts of their own compute the same, and migrating changes no bit."""
    model, ranks = models(name), written(name, qformat, tp_size=2)
    directory = tmp_path / "migrated"
    phireg.migrate(ranks, model.source, directory, target="hf-modelopt")
    ids = exports.rows()[:1]
    expected, actual = (load(d, dtype=torch.float32)(ids)[0] for d in (directory, ranks))
    assert (actual - expected).norm() < 1e-5 * expected.norm()
    if name != "phi2":  # its directories have one scale for q, k, v and fc1
        direct = written(name, qformat, target="hf-modelopt")
        left, right = (load_file(d / "model.safetensors") for d in (directory, direct))
        assert {n: bits(t) for n, t in left.items()} == {n: bits(t) for n, t in right.items()}
    result = phireg.verify(ranks, model.source, checks=("structure", "config", "weights", "ranks"))
    assert all(check.verdict == "passed" for check in result.checks)


def test_factors_that_a_directory_has_in_norms_are_not_migrated(tmp_path, models, written):
    with pytest.raises(UsageError, match="norms"):
        phireg.migrate(written("phi2", "int4_awq"), models("phi2").source, tmp_path / "out")


def pairs(weight):
    raw = weight.view(torch.uint8)
    return ((raw >> 4) | (raw << 4)).view(weight.dtype)


@pytest.mark.parametrize(
    ("qformat", "part", "edit"),
    [
        ("int4_awq", "weight", pairs),
        ("int4_awq", "weights_scaling_factor", lambda scale: scale.roll(1, 0)),
        ("int4_awq", "prequant_scaling_factor", torch.ones_like),
        ("w4a8_awq", "weight", lambda weight: weight.flip(0)),
        ("nvfp4", "weights_scaling_factor_2", lambda scale: 2 * scale),
    ],
)
def test_planted_errors_are_named_with_their_place(tmp_path, models, written, qformat, part, edit):
    checkpoint, model = tmp_path / "ckpt", models("phi3")
    checkpoint.mkdir()
    for file in written("phi3", qformat, tp_size=2).iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    path = checkpoint / "rank1.safetensors"
    name = "transformer.layers.1.mlp.proj"
    held = load_file(path)
    held[f"{name}.{part}"] = edit(held[f"{name}.{part}"]).contiguous()
    save_file(held, path)
    result = phireg.verify(checkpoint, model.source, checks=("structure", "weights"))
    assert result.verdict == "failed"
    problems = result.check("weights").problems
    assert problems and all(p.where.startswith("rank1") and name in p.where for p in problems)
    assert {(p.layer, p.part) for p in problems} == {(1, "mlp")}


@pytest.mark.parametrize("qformat", ["int4_awq", "w4a8_awq", "nvfp4"])
def test_memory_is_planned_for_what_weights_are_kept_as(qformat, written, monkeypatch):
    """Packed, as on a GPU, or as values where products are rounded once more."""
    directory = written("phi3", qformat)
    monkeypatch.setattr(quantized, "keeps_levels", lambda device, grid: True)
    executor = load(directory)
    layers = [executor.layer_weights(n)[0] for n in range(executor.spec.num_layers)]
    tensors = [t for weights in (*layers, executor.end_weights()[0]) for t in weights.values()]
    size = sum(tensor.nbytes for tensor in tensors)
    for free, offload in ((size, True), (2 * size, False)):
        monkeypatch.setattr("phireg.executor.model.free_memory", lambda free=free: free)
        assert load(directory).offload == offload
