"""Plans of engines: who builds, for which GPUs, up to which limits, and every reason not to."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.command_line import run_phireg
from specs import DEMOS, GROUPED, config_of, spec_of

import phireg
from phireg.errors import EngineError, UsageError
from phireg.reader.spec import parse_spec
from phireg.tensorrt import backends, plan, requirements
from phireg.tensorrt.plan import parse_gpus


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    output = tmp_path_factory.mktemp("plan") / "ckpt"
    phireg.convert(phireg.plan(DEMOS / "phi3_mini" / "demo", dtype="bfloat16"), output)
    return output


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(plan, "here", lambda: ())
    monkeypatch.setattr(backends, "here", lambda: ())


def planned(checkpoint, **options):
    options = phireg.BuildOptions(**options)
    return phireg.plan_build(checkpoint, "engine", options, backend="tensorrt-rtx")


def test_the_gpus_are_all_that_can_run_the_model(checkpoint):
    found = planned(checkpoint)
    assert found.gpus == ("sm80", "sm86", "sm89", "sm120", "sm121")
    assert any("8.0" in note for note in found.notes)


@pytest.mark.parametrize(
    ("here", "gpus"),
    [(("sm89",), ("sm89",)), (("sm90", "sm120"), ("sm120",)), (("sm90",), None)],
)
def test_the_gpus_here(checkpoint, monkeypatch, here, gpus):
    monkeypatch.setattr(plan, "here", lambda: here)
    found = planned(checkpoint)
    assert found.gpus == (gpus or ("sm80", "sm86", "sm89", "sm120", "sm121"))
    assert any("sm90" in note for note in found.notes) == (gpus is None)


def test_a_builder_that_measures_takes_the_first_gpu(monkeypatch):
    monkeypatch.setattr(plan, "here", lambda: ("sm80", "sm90"))
    package, spec = SimpleNamespace(capabilities=(), name="TensorRT"), spec_of("phi2")
    for chosen in ((), ("sm80",)):
        assert plan._gpus(package, spec, chosen)[0] == ("sm80",)
    for chosen in (("sm90",), ("sm80", "sm90")):
        with pytest.raises(UsageError):
            plan._gpus(package, spec, chosen)


def test_all_reasons_are_told_at_once():
    spec = spec_of("phi3-small", "int4_wo")
    spec = replace(spec, dtype="bfloat16")
    problems = [
        *requirements.capability_problems(spec, ("sm75", "sm89")),
        *requirements.form_problems(spec, "separate"),
    ]
    assert len(problems) == 3
    assert all("sm89" not in problem for problem in problems)


def test_int4_weights_of_an_odd_size():
    config = config_of("phi3-mini", "int4_wo") | {"intermediate_size": 33, "hidden_size": 35}
    problems = list(requirements.size_problems(parse_spec(config)))
    assert [problem.partition(" ")[0] for problem in problems] == ["mlp.proj.weight"]
    assert not list(requirements.size_problems(spec_of("phi3-mini", "int4_wo")))


def test_quantized_experts():
    (problem,) = requirements.size_problems(spec_of("phi3.5-moe", "fp8"))
    assert "TensorRT-LLM" in problem
    assert not list(requirements.size_problems(spec_of("phi3.5-moe")))


@pytest.mark.parametrize("form", GROUPED)
def test_weights_in_groups(form):
    (problem,) = requirements.size_problems(spec_of("phi3-mini", form))
    assert "TensorRT-LLM" in problem


def test_a_gpu_that_cannot_run_the_model(checkpoint):
    with pytest.raises(EngineError, match=r"bfloat16 needs compute capability 8\.0"):
        planned(checkpoint, gpus=("sm89", "sm75"))
    with pytest.raises(EngineError, match="sm90") as raised:
        planned(checkpoint, gpus=("sm90",))
    assert "--backend tensorrt" in raised.value.hint


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, (8, 511, 512, 511)),
        ({"max_seq_len": 64}, (8, 63, 64, 63)),
        ({"max_input_len": 100, "max_output_len": 28, "max_batch_size": 3}, (3, 100, 128, 100)),
        ({"max_input_len": 20}, (8, 20, 512, 20)),
    ],
)
def test_limits(checkpoint, options, limits):
    found = planned(checkpoint, **options).limits
    assert (
        found.max_batch_size, found.max_input_len, found.max_seq_len, found.max_chunk_len,
    ) == limits  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"max_seq_len": 513},
        {"max_seq_len": 64, "max_output_len": 8},
        {"max_seq_len": 64, "max_input_len": 64},
        {"max_input_len": 512},
        {"max_seq_len": 1},
        {"max_batch_size": 10**7},
        {"tp_size": 2},
        {"pp_size": 2},
        {"extra": ("--max_num_tokens", "9")},
    ],
)
def test_options_that_contradict_each_other_or_the_checkpoint(checkpoint, options):
    with pytest.raises(UsageError):
        planned(checkpoint, **options)


def test_prompts_of_sparse_models_come_in_smaller_steps():
    """Their mask has a plane per head."""
    options = phireg.BuildOptions(max_seq_len=512)
    spec = spec_of("phi3-small")
    assert plan._limits(spec, options).max_chunk_len < plan._limits(
        replace(spec, sparse=None), options
    ).max_chunk_len  # fmt: skip


def test_what_a_user_would_not_expect_is_told():
    (note,) = requirements.remarks(spec_of("phi2", "kv_fp8"), 64)
    assert "16 bits" in note
    (note,) = requirements.remarks(spec_of("phi3.5-moe"), 64)
    assert "6 experts" in note
    (note,) = requirements.remarks(spec_of("phi2"), 32768)
    assert "--max-seq-len" in note


@pytest.mark.parametrize(
    ("text", "gpus"),
    [("sm89,sm120", ("sm89", "sm120")), ("8.9, 12.0", ("sm89", "sm120")), ("SM_75,75", ("sm75",))],
)
def test_spellings_of_gpus(text, gpus):
    assert parse_gpus(text) == gpus


@pytest.mark.parametrize("text", ["", "ada", "sm89,,sm90", "8", "sm1234"])
def test_no_gpu(text):
    with pytest.raises(UsageError):
        parse_gpus(text)


# Who builds


def shown(checkpoint, *options, exit_code=0):
    found = run_phireg(
        "build", checkpoint, "--output-dir", "engine", "--print-command", *options, "--json"
    )
    assert found.exit_code == exit_code, found.output
    return json.loads(found.stdout) if not exit_code else found.output


@pytest.fixture
def no_trtllm(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")


def test_without_tensorrt_llm_it_is_tensorrt_for_rtx(checkpoint, no_trtllm):
    found = shown(checkpoint)
    assert found["backend"] == "tensorrt-rtx"
    assert "trtllm-build" in found["notes"][0]


@pytest.mark.parametrize(
    ("gpus", "old", "chosen"),
    [
        ((), (), "tensorrt-rtx"),
        (("sm90",), (), "tensorrt"),
        (("sm89",), ("tensorrt",), "tensorrt-rtx"),
    ],
)
def test_tensorrt_comes_first_where_there_is_a_gpu_and_it_is_new_enough(
    checkpoint, no_trtllm, monkeypatch, gpus, old, chosen
):
    def load(name):
        if name in old:
            raise EngineError("it is too old")

    asked = []
    monkeypatch.setattr(backends, "installed", lambda: {"tensorrt": "11.4", "tensorrt-rtx": "1.7"})
    monkeypatch.setattr(backends, "load_package", load)
    monkeypatch.setattr(backends, "plan_engine", lambda name, *_, **__: asked.append(name))
    monkeypatch.setattr(backends, "here", lambda: gpus)
    backends.plan_build(checkpoint, "engine")
    assert asked == [chosen]


def test_nothing_builds(checkpoint, no_trtllm, monkeypatch):
    monkeypatch.setattr(backends, "installed", dict)
    output = shown(checkpoint, exit_code=7)
    for name in ("phireg[rtx]", "phireg[tensorrt]", "tensorrt_llm"):
        assert name in output


def test_options_of_tensorrt_llm_are_not_dropped_silently(checkpoint, no_trtllm):
    flags = "--gemm_plugin", "bfloat16", "--context_fmha", "enable"
    notes = " ".join(shown(checkpoint, *flags)["notes"])
    assert "--gemm-plugin" in notes
    assert "--context-fmha" in notes


def test_options_that_tensorrt_llm_lacks_choose_another(checkpoint, monkeypatch):
    def asked(*_, **__):
        raise AssertionError

    monkeypatch.setattr(backends.trtllm_build, "plan_build", asked)
    for option in (("--gpu", "sm89"), ("--weights", "separate")):
        assert shown(checkpoint, *option)["backend"] == "tensorrt-rtx"
    monkeypatch.undo()
    assert "--gpu" in shown(checkpoint, "--gpu", "sm89", "--trtllm-version", "1.2.1", exit_code=2)


def test_what_a_build_takes_grows_with_the_weights():
    """As benchmarks/engine.py measured it of Phi-3-mini: docs/benchmarks.md."""
    published = config_of("phi3-mini") | {
        "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 8192, "vocab_size": 32064,
    }  # fmt: skip
    for key in [key for key in published if key.startswith("longrope")] + ["head_size"]:
        published.pop(key, None)
    published["position_embedding_type"] = "rope_gpt_neox"
    full, separate = (
        requirements.estimate(parse_spec(published), form, 1, 4096)
        for form in ("embedded", "separate")
    )
    assert full.engine_bytes == pytest.approx(7.658e9, rel=0.02)
    assert separate.engine_bytes == pytest.approx(15.7e6, rel=0.1)
    assert full.memory_bytes == pytest.approx(13.6e9, rel=0.1)
    assert separate.memory_bytes < 0.6e9
    assert (full.cpu_seconds, separate.cpu_seconds) == pytest.approx((41, 10), rel=0.1)
    fp8 = parse_spec(published | {"quantization": {"quant_algo": "FP8"}})
    measured = requirements.estimate(fp8, "embedded", 1, 4096)
    assert measured.engine_bytes == pytest.approx(4.067e9, rel=0.02)
    assert measured.memory_bytes == pytest.approx(5.4e9, rel=0.1)
    quantized = parse_spec(published | {"quantization": {"quant_algo": "W4A16"}})
    assert requirements.estimate(quantized, "embedded", 1, 4096).engine_bytes < 0.35 * 7.658e9
