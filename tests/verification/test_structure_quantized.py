"""Structure of quantized checkpoints: what the reader rejects, and what it takes all the same."""

import pytest
from helpers.by_hand import calibration, model, write_model
from helpers.plan_sources import LAYERS

import phireg
from phireg.reader.structure import structure_findings
from phireg.reader.tensors import required_tensors

QKV = "transformer.layers.1.attention.qkv"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Config and tensors (dtype code, shape) of real checkpoints, by format and KV cache."""
    directory = tmp_path_factory.mktemp("structure")
    source = write_model(directory / "hf", "small", model("small"))
    checkpoints = {}
    for qformat in ("fp8", "int8_sq", "int8_wo"):
        for cache in (None, "fp8"):
            plan = phireg.plan(
                source, family="phi3-small", qformat=qformat, kv_cache_dtype=cache, tp_size=2
            )
            phireg.quantize(plan, directory / f"{qformat}{cache}", calibration("small"))
            inspection = phireg.inspect(directory / f"{qformat}{cache}")
            checkpoints[qformat, cache] = inspection.config, [dict(r) for r in inspection.ranks]
    return checkpoints


def judged(written, qformat, cache=None, **changes):
    """Problems and notes after changing rank 1; None removes a tensor."""
    config, (first, second) = written[qformat, cache]
    ranks = [first, {n: t for n, t in {**second, **changes}.items() if t is not None}]
    findings = structure_findings(config, ranks)
    notes = [(where, text) for where, text, harmless in findings if harmless]
    return [(where, text) for where, text, harmless in findings if not harmless], notes


@pytest.mark.parametrize("cache", [None, "fp8"])
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int8_wo"])
def test_what_phireg_writes_is_right(written, qformat, cache):
    assert judged(written, qformat, cache) == ([], [])


K_SCALE, KV_SCALE = (
    f"transformer.layers.1.attention.{part}_cache_scaling_factor" for part in ("k", "kv")
)


@pytest.mark.parametrize(
    ("qformat", "cache", "name", "tensor", "text"),
    [
        ("fp8", None, f"{QKV}.weights_scaling_factor", None, "is missing"),
        ("fp8", None, f"{QKV}.activation_scaling_factor", None, "is missing"),
        ("fp8", None, f"{QKV}.bias", None, "is missing"),
        ("int8_sq", None, f"{QKV}.weights_scaling_factor", None, "is missing"),
        ("int8_sq", None, f"{QKV}.activation_scaling_factor", None, "is missing"),
        ("int8_sq", None, f"{QKV}.prequant_scaling_factor", None, "is missing"),
        ("fp8", "fp8", KV_SCALE, None, "is missing"),
        ("fp8", None, KV_SCALE, ("F32", (1,)), "is not known"),
        ("fp8", None, K_SCALE, ("F32", (1,)), "is not known"),
        ("int8_sq", None, "lm_head.activation_scaling_factor", ("F32", (1,)), "is not known"),
        ("fp8", None, f"{QKV}.prequant_scaling_factor", ("F32", (1,)), "is not known"),
        ("fp8", None, f"{QKV}.weight", ("F16", (24, 24)), "is F16, config.json says F8_E4M3"),
        ("int8_sq", None, f"{QKV}.weight", ("F8_E4M3", (24, 24)), "is F8_E4M3"),
        ("int8_wo", None, f"{QKV}.weight", ("I8", (24, 24)), "is I8, config.json says F16"),
        ("fp8", None, "lm_head.weight", ("F8_E4M3", (19, 24)), "is F8_E4M3"),
        ("fp8", None, f"{QKV}.weights_scaling_factor", ("F32", (24,)), "is [24]"),
        ("fp8", None, f"{QKV}.weights_scaling_factor", ("F16", (1,)), "is F16"),
        ("int8_sq", None, f"{QKV}.weights_scaling_factor", ("F32", (1,)), "is [1]"),
        ("int8_sq", None, f"{QKV}.prequant_scaling_factor", ("F32", (24,)), "is F32"),
    ],
)
def test_a_missing_unknown_or_wrong_tensor(written, qformat, cache, name, tensor, text):
    problems, notes = judged(written, qformat, cache, **{name: tensor})
    ((where, problem),) = problems
    assert where == f"rank1.safetensors: {name}"
    assert text in problem
    assert notes == []


def test_row_parallel_scales_are_cut_along_the_input(written):
    """A rank of attention.dense has half the columns and all rows."""
    name = "transformer.layers.0.attention.dense"
    config, _ = written["int8_sq", None]
    required = required_tensors(config, 2)
    assert required[f"{name}.weight"] == ("I8", (24, 12))
    assert required[f"{name}.weights_scaling_factor"] == ("F32", (24,))
    assert required[f"{name}.prequant_scaling_factor"] == ("F16", (12,))


def test_what_early_exporters_wrote_otherwise_is_a_note(written):
    changes = {
        f"{QKV}.weight": ("I8", (24, 24)),
        f"{QKV}.activation_scaling_factor": ("F32", ()),
        K_SCALE: ("F32", (1,)),
        "lm_head.activation_scaling_factor": ("F32", (1,)),
    }
    problems, notes = judged(written, "fp8", "fp8", **changes)
    assert problems == []
    assert {where.removeprefix("rank1.safetensors: ") for where, _ in notes} == set(changes)


@pytest.mark.parametrize("pattern", ["*.attention.dense", "dense", "transformer.*.dense"])
def test_excluded_linears_stay_in_the_checkpoints_dtype(written, pattern):
    """Patterns of whole names, and last names as the first releases compare them."""
    config, _ = written["fp8", None]
    blocks = {**config["quantization"], "exclude_modules": ["lm_head", pattern]}
    required = required_tensors({**config, "quantization": blocks}, 2)
    dense = [f"transformer.layers.{i}.attention.dense" for i in range(LAYERS)]
    assert {required[f"{name}.weight"] for name in dense} == {("F16", (24, 12))}
    assert not [n for n in required if n.endswith("factor") and n.rpartition(".")[0] in dense]
    assert required[f"{QKV}.weight"][0] == "F8_E4M3"


@pytest.mark.parametrize("listed", [None, [], ["lm_head", "transformer.layers.0.attention"]])
def test_lists_that_exclude_no_linear(written, listed):
    config, _ = written["int8_sq", None]
    blocks = {**config["quantization"], "exclude_modules": listed}
    assert required_tensors({**config, "quantization": blocks}, 1) == required_tensors(config, 1)


@pytest.mark.parametrize(("dim", "shape"), [(0, (19, 24)), (1, (37, 12))])
def test_exporters_that_cut_the_embedding(written, dim, shape):
    config, _ = written["fp8", None]
    cut = {**config, "use_parallel_embedding": True, "embedding_sharding_dim": dim}
    assert required_tensors(cut, 2)["transformer.vocab_embedding.weight"] == ("F16", shape)


def test_an_unknown_algorithm_is_not_judged(written):
    config, ranks = written["fp8", None]
    other = {
        **config,
        "quantization": {"quant_algo": "FP8_BLOCK_SCALES", "kv_cache_quant_algo": None},
    }
    assert structure_findings(other, ranks) == []
