"""The builder's arguments, release by release, written out from the releases' own help texts."""

import pytest

from phireg.errors import EngineError, UsageError
from phireg.trtllm.command import BuildOptions, translate
from phireg.trtllm.releases import release_of

PHI2 = {
    "architecture": "PhiForCausalLM", "dtype": "float16", "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 2048,
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
}  # fmt: skip
MINI = PHI2 | {
    "architecture": "Phi3ForCausalLM", "dtype": "bfloat16", "max_position_embeddings": 4096,
}  # fmt: skip
MEDIUM = MINI | {"num_attention_heads": 40, "num_key_value_heads": 10}
SMALL = MINI | {
    "architecture": "Phi3SmallForCausalLM", "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "dense_attention_every_n_layers": 2,
    "blocksparse_block_size": 64, "blocksparse_num_local_blocks": 16,
}  # fmt: skip
FP8 = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
TP2 = {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}}

GUIDES_COMMIT = "0.11.0.dev2024060400"
SINCE_012 = ("0.12.0", "0.13.0", "0.14.0", "0.17.0.post1", "0.21.0", "1.0.0", "1.1.0", "1.2.1",
             "1.3.0rc20")  # fmt: skip
ALL = ("0.10.0", GUIDES_COMMIT, "0.11.0", *SINCE_012)

GUIDE = BuildOptions(
    gemm_plugin="float16",
    max_batch_size=8,
    max_input_len=1024,
    max_output_len=1024,
    tp_size=1,
    pp_size=1,
)
"""The one command of the original guide."""


def flags(config, version, weights=True, **options):
    return " ".join(translate(config, BuildOptions(**options), version, weights=weights).flags)


# The guide's own command, on phi-2


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (
            "0.10.0",
            "--max_batch_size 8 --max_input_len 1024 --max_output_len 1024 --gemm_plugin float16 "
            "--gpt_attention_plugin float16",
        ),
        (
            GUIDES_COMMIT,
            "--max_batch_size 8 --max_input_len 1024 --max_output_len 1024 --gemm_plugin float16",
        ),
        (
            "0.11.0",
            "--max_batch_size 8 --max_input_len 1024 --max_seq_len 2048 --gemm_plugin float16",
        ),
        (
            "0.12.0",
            "--max_batch_size 8 --max_input_len 1024 --max_seq_len 2048 --gemm_plugin float16",
        ),
        (
            "0.14.0",
            "--max_batch_size 8 --max_input_len 1024 --max_seq_len 2048 --gemm_plugin float16",
        ),
        (
            "0.17.0.post1",
            "--max_batch_size 8 --max_input_len 1024 --max_seq_len 2048 --gemm_plugin float16",
        ),
        (
            "0.21.0",
            "--max_batch_size 8 --max_input_len 1024 --max_seq_len 2048 --gemm_plugin float16",
        ),
        (
            "1.0.0",
            "--max_batch_size 8 --max_input_len 1024 --max_seq_len 2048 --gemm_plugin float16",
        ),
        (
            "1.2.1",
            "--max_batch_size 8 --max_input_len 1024 --max_seq_len 2048 --gemm_plugin float16",
        ),
        (
            "1.3.0rc20",
            "--max_batch_size 8 --max_input_len 1024 --max_seq_len 2048 --gemm_plugin float16",
        ),
    ],
)
def test_the_guides_command(version, expected):
    command = translate(PHI2, GUIDE, version)
    assert " ".join(command.flags) == expected
    assert command.notes == ()
    assert command.tp_size == 1


# One option at a time: (config, options, {flags: the releases that take them so})

NOTHING_AT_010 = "--gpt_attention_plugin bfloat16"
"""Always given there: its default was float16, whatever the checkpoint's dtype."""


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize(
    ("options", "before_011", "at_011", "since_012"),
    [
        ({}, "", "", ""),
        ({"max_batch_size": 4}, *["--max_batch_size 4"] * 3),
        ({"max_input_len": 300}, *["--max_input_len 300"] * 3),
        (
            {"max_output_len": 100},
            "--max_output_len 100",
            "--max_seq_len 1124",
            "--max_seq_len 1124",
        ),
        (
            {"max_seq_len": 2000},
            "--max_output_len 976",
            "--max_seq_len 2000",
            "--max_seq_len 2000",
        ),
        (
            {"max_input_len": 300, "max_seq_len": 2000},
            "--max_input_len 300 --max_output_len 1700",
            "--max_input_len 300 --max_seq_len 2000",
            "--max_input_len 300 --max_seq_len 2000",
        ),
        ({"gemm_plugin": "bfloat16"}, *["--gemm_plugin bfloat16"] * 3),
        ({"gemm_plugin": "disable"}, *["--gemm_plugin disable"] * 3),
        ({"context_fmha": True}, *["--context_fmha enable"] * 3),
        ({"context_fmha": False}, *["--context_fmha disable"] * 3),
        (
            {"context_fmha_fp32_acc": True},
            "--context_fmha_fp32_acc enable",
            "--context_fmha_fp32_acc enable",
            "",
        ),
        ({"workers": 2}, *["--workers 2"] * 3),
        ({"tp_size": 1, "pp_size": 1}, "", "", ""),
        ({"extra": ("--max_num_tokens", "2048")}, *["--max_num_tokens 2048"] * 3),
    ],
)
def test_each_option(options, before_011, at_011, since_012, version):
    expected = {"0.10.0": before_011, GUIDES_COMMIT: before_011, "0.11.0": at_011}
    given = flags(MINI, version, **options)
    if version == "0.10.0":
        assert NOTHING_AT_010 in given
        given = " ".join(given.replace(NOTHING_AT_010, "").split())
    assert given == expected.get(version, since_012)


@pytest.mark.parametrize("version", ALL)
def test_auto_plugins(version):
    expected = "--gemm_plugin auto --gpt_attention_plugin auto"
    if version == "0.10.0":
        expected = expected.replace("auto", "bfloat16")
    assert flags(MINI, version, gemm_plugin="auto", gpt_attention_plugin="auto") == expected


@pytest.mark.parametrize("version", ALL)
def test_float32_accumulation_is_kept_for_the_runtime(version):
    command = translate(MINI, BuildOptions(context_fmha_fp32_acc=True), version)
    if version in SINCE_012:
        assert command.run_options == {"enable_context_fmha_fp32_acc": True}
        assert len(command.notes) == 1
        assert "run-time option since 0.12" in command.notes[0]
    else:
        assert command.run_options == {}
        assert command.notes == ()


@pytest.mark.parametrize("version", ALL)
def test_fp8(version):
    config = MINI | FP8
    given = flags(config, version, use_fp8_context_fmha=True)
    assert "--use_fp8_context_fmha enable" in given
    if version in ("0.10.0", GUIDES_COMMIT):
        with pytest.raises(EngineError, match="has no --gemm-plugin fp8"):
            flags(config, version, gemm_plugin="fp8")
    else:
        assert flags(config, version, gemm_plugin="fp8") == "--gemm_plugin fp8"


# Ranks


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("config", [MINI, SMALL], ids=["mini", "small"])
def test_ranks_come_from_the_checkpoint(config, version):
    if config is SMALL and version == "0.10.0":
        return
    command = translate(config | TP2, BuildOptions(tp_size=2), version)
    assert command.tp_size == 2
    assert "--tp_size" not in command.flags
    with pytest.raises(UsageError, match="--tp-size 4: the checkpoint is split for 2"):
        translate(config | TP2, BuildOptions(tp_size=4), version)


@pytest.mark.parametrize("version", ["0.10.0", GUIDES_COMMIT, "0.11.0"])
def test_phi2_is_split_by_old_readers(version):
    with pytest.raises(EngineError, match="already split for 2 ranks") as caught:
        translate(PHI2 | TP2, BuildOptions(), version)
    assert "convert with --tp-size 1" in caught.value.hint
    whole = translate(PHI2, BuildOptions(tp_size=2), version)
    assert whole.tp_size == 2
    assert "--tp_size 2 --pp_size 1" in " ".join(whole.flags)
    empty = translate(PHI2 | TP2, BuildOptions(), version, weights=False)
    assert "--tp_size 2 --pp_size 1" in " ".join(empty.flags)


@pytest.mark.parametrize("version", SINCE_012)
def test_phi2_is_split_by_the_converter_since_012(version):
    assert translate(PHI2 | TP2, BuildOptions(), version).flags == ()


def test_no_pipeline_stages():
    with pytest.raises(UsageError, match="--pp-size 2"):
        translate(MINI, BuildOptions(pp_size=2), "1.2.1")


# Phi-3-small's block sparsity


@pytest.mark.parametrize(
    ("version", "options", "disabled"),
    [
        (GUIDES_COMMIT, {}, False),  # prompts of 1024 at most
        (GUIDES_COMMIT, {"max_input_len": 1025}, True),
        ("0.11.0", {}, True),  # prompts of 8191
        ("0.12.0", {"max_input_len": 1024, "max_output_len": 1024}, True),
        ("0.14.0", {"max_seq_len": 1026}, True),
        ("0.17.0", {"max_seq_len": 1025}, False),
        ("0.21.0", {}, True),
        ("1.0.0", {"max_input_len": 512, "max_output_len": 512}, False),
        ("1.2.1", {}, True),
    ],
)
def test_long_prompts_disable_fused_attention(version, options, disabled):
    command = translate(SMALL, BuildOptions(**options), version)
    assert ("--context_fmha disable" in " ".join(command.flags)) == disabled
    assert [("over 1024 tokens" in note) for note in command.notes] == [True] * disabled


def test_the_user_may_say_otherwise():
    command = translate(SMALL, BuildOptions(context_fmha=True), "1.2.1")
    assert command.flags == ("--context_fmha", "enable")
    assert command.notes == ()


def test_nothing_is_sparse_where_every_layer_is_dense():
    assert flags(SMALL | {"dense_attention_every_n_layers": 1}, "1.2.1") == ""


def test_what_has_no_effect_without_fused_attention_is_said():
    command = translate(SMALL, BuildOptions(context_fmha_fp32_acc=True), "1.2.1")
    assert command.flags == ("--context_fmha", "disable")
    assert command.run_options == {}
    assert "--context-fmha-fp32-acc has no effect" in command.notes[1]


# What cannot be


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (MINI, {"max_output_len": 8, "max_seq_len": 8}, "two ways to say the same"),
        (MINI, {"max_seq_len": 4097}, "4097 tokens are more than the 4096 positions"),
        (MINI, {"max_input_len": 4097}, "4097 tokens are more than the 4096 positions"),
        (MINI, {"max_output_len": 4000}, "5024 tokens are more than the 4096 positions"),
        (MINI, {"max_input_len": 512, "max_seq_len": 512}, "leaves no room"),
        (MINI, {"gemm_plugin": "float16"}, "the checkpoint is bfloat16"),
        (PHI2, {"gpt_attention_plugin": "bfloat16"}, "the checkpoint is float16"),
        (MINI, {"gemm_plugin": "fp8"}, "needs an FP8 checkpoint"),
        (MINI, {"use_fp8_context_fmha": True}, "needs an FP8 checkpoint"),
        (MINI, {"context_fmha": False, "context_fmha_fp32_acc": True}, "is disabled"),
        (MINI | FP8, {"context_fmha": False, "use_fp8_context_fmha": True}, "is disabled"),
        (MINI, {"gpt_attention_plugin": "disable", "context_fmha": True}, "is part of the"),
        (MINI, {"extra": ("--output_dir=x",)}, "phireg decides --output_dir"),
        (MINI, {"extra": ("--max-seq-len", "8")}, "phireg decides --max_seq_len"),
        (MINI, {"extra": ("--max_seq", "8")}, "phireg decides --max_seq_len"),
    ],
)
def test_contradictions(config, options, message):
    with pytest.raises(UsageError, match=message):
        translate(config, BuildOptions(**options), "1.2.1")


def test_a_length_that_old_releases_cannot_be_told():
    with pytest.raises(UsageError, match="leaves no room for new tokens"):
        translate(MINI, BuildOptions(max_seq_len=1000), "0.10.0")


@pytest.mark.parametrize("config", [SMALL, MEDIUM], ids=["small", "medium"])
def test_models_that_010_cannot_read(config):
    with pytest.raises(EngineError, match=r"need 0\.11 or later"):
        translate(config, BuildOptions(), "0.10.0")
    translate(config, BuildOptions(), GUIDES_COMMIT)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("0.10.0", "0.10"),
        ("0.11.0.dev2024052800", "0.10"),
        (GUIDES_COMMIT, "0.11 of 2024-06-04"),
        ("0.11.0.dev2024061100", "0.11"),
        ("0.12.0.dev2024072300", "0.12"),
        ("0.16.0", "0.15 to 0.17"),
        ("0.18.2", "0.18 to 0.21"),
        ("0.20.0rc3", "0.18 to 0.21"),
        ("1.0.0rc4", "1.0"),
        ("1.2.0rc6.post3", "1.2"),
        ("1.2.1+cu13", "1.2"),
        ("1.3.0rc1", "1.3 to rc20"),
        ("1.3.0rc20", "1.3 to rc20"),
    ],
)
def test_lines(version, name):
    assert release_of(version).name == name


@pytest.mark.parametrize("version", ["1.3.0rc21", "1.3.0", "1.4.0rc1", "2.0"])
def test_releases_without_engine_backend(version):
    with pytest.raises(EngineError, match="has no engine backend") as caught:
        release_of(version)
    assert "pip install tensorrt_llm==1.2.1" in caught.value.hint


@pytest.mark.parametrize(("version", "kind"), [("0.9.0", EngineError), ("newest", UsageError)])
def test_versions_that_are_none(version, kind):
    with pytest.raises(kind):
        release_of(version)


def test_experts_are_read_since_014():
    moe = {**MINI, "architecture": "PhiMoEForCausalLM", "moe": {"num_experts": 16}}
    with pytest.raises(EngineError) as caught:
        translate(moe, BuildOptions(), "0.13.0")
    assert "0.14 or later" in caught.value.message
    for version in ("0.14.0", "1.2.1"):
        assert "--gemm_plugin" in translate(moe, BuildOptions(gemm_plugin="auto"), version).flags
