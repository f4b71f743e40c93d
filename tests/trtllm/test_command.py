"""The builder's arguments by range of releases, written out from the releases' own help texts."""

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
MOE = MINI | {"architecture": "PhiMoEForCausalLM", "moe": {"num_experts": 16}}
FP8 = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
TP2 = {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}}

GUIDES_COMMIT = "0.11.0.dev2024060400"
VERSIONS = ("0.10.0.dev2024041600", GUIDES_COMMIT, "0.11.0", "0.12.0.dev2024072300")
"""One of each range."""


def flags(config, version, **options):
    return " ".join(translate(config, BuildOptions(**options), version).flags)


@pytest.mark.parametrize(
    ("version", "limit", "attention"),
    [
        ("0.10.0", "--max_output_len 1024", " --gpt_attention_plugin float16"),
        ("0.11.0.dev2024052800", "--max_output_len 1024", " --gpt_attention_plugin float16"),
        (GUIDES_COMMIT, "--max_output_len 1024", ""),
        ("0.11.0.dev2024061100", "--max_seq_len 2048", ""),
        ("1.2.1+cu13", "--max_seq_len 2048", ""),
        ("1.3.0rc20", "--max_seq_len 2048", ""),
    ],
)
def test_the_guides_command(version, limit, attention):
    options = BuildOptions(
        gemm_plugin="float16", max_batch_size=8, max_input_len=1024, max_output_len=1024,
        tp_size=1, pp_size=1,
    )  # fmt: skip
    command = translate(PHI2, options, version)
    expected = f"--max_batch_size 8 --max_input_len 1024 {limit} --gemm_plugin float16{attention}"
    assert " ".join(command.flags) == expected
    assert command.notes == ()
    assert command.tp_size == 1


@pytest.mark.parametrize(
    ("options", "output_len_limited", "sum_limited"),
    [
        ({}, "", ""),
        ({"max_output_len": 100}, "--max_output_len 100", "--max_seq_len 1124"),
        ({"max_seq_len": 2000}, "--max_output_len 976", "--max_seq_len 2000"),
        (
            {"max_input_len": 300, "max_seq_len": 2000},
            "--max_input_len 300 --max_output_len 1700",
            "--max_input_len 300 --max_seq_len 2000",
        ),
        ({"gemm_plugin": "disable"}, *["--gemm_plugin disable"] * 2),
        ({"context_fmha": False}, *["--context_fmha disable"] * 2),
        ({"workers": 2}, *["--workers 2"] * 2),
        ({"extra": ("--max_num_tokens", "2048")}, *["--max_num_tokens 2048"] * 2),
    ],
)
def test_each_option(options, output_len_limited, sum_limited):
    assert flags(MINI, GUIDES_COMMIT, **options) == output_len_limited
    assert flags(MINI, "1.2.1", **options) == sum_limited


LONG = MINI | {"max_position_embeddings": 131072}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_takes_the_longest_prompt(version):
    """Since 0.11 the builder's default is 8192; before, it was as long as the prompts."""
    for prompt in (8192, 20_000):
        line = flags(LONG, version, max_input_len=prompt, max_output_len=100)
        wanted = prompt > 8192 and version not in VERSIONS[:2]
        assert ("--max_num_tokens" in line) == wanted
        assert (f"--max_num_tokens {prompt}" in line) == wanted
    for own in (("--max_num_tokens", "9000"), ("--max-num-tokens=9000",)):
        line = flags(LONG, version, max_input_len=20_000, extra=own)
        assert line.count("num") == 1 and line.endswith(" ".join(own))


@pytest.mark.parametrize("version", VERSIONS)
def test_auto_plugins(version):
    value = "bfloat16" if version == VERSIONS[0] else "auto"
    expected = f"--gemm_plugin {value} --gpt_attention_plugin {value}"
    assert flags(MINI, version, gemm_plugin="auto", gpt_attention_plugin="auto") == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_float32_accumulation_is_kept_for_the_runtime(version):
    command = translate(MINI, BuildOptions(context_fmha_fp32_acc=True), version)
    at_run_time = version == VERSIONS[3]
    assert ("--context_fmha_fp32_acc enable" in " ".join(command.flags)) == (not at_run_time)
    assert command.run_options == ({"enable_context_fmha_fp32_acc": True} if at_run_time else {})
    assert len(command.notes) == at_run_time


@pytest.mark.parametrize("version", VERSIONS)
def test_fp8(version):
    config = MINI | FP8
    assert "--use_fp8_context_fmha enable" in flags(config, version, use_fp8_context_fmha=True)
    if version in VERSIONS[:2]:
        with pytest.raises(EngineError):
            flags(config, version, gemm_plugin="fp8")
    else:
        assert flags(config, version, gemm_plugin="fp8") == "--gemm_plugin fp8"


# Ranks


@pytest.mark.parametrize("version", [GUIDES_COMMIT, "1.2.1"])
def test_ranks_come_from_the_checkpoint(version):
    command = translate(MINI | TP2, BuildOptions(tp_size=2), version)
    assert command.tp_size == 2
    assert "--tp_size" not in command.flags
    for options in ({"tp_size": 4}, {"pp_size": 2}):
        with pytest.raises(UsageError):
            flags(MINI | TP2, version, **options)


def test_phi2_is_split_by_readers_before_012():
    with pytest.raises(EngineError) as caught:
        translate(PHI2 | TP2, BuildOptions(), "0.11.0")
    assert "--tp-size 1" in caught.value.hint
    for config, options, weights in ((PHI2, {"tp_size": 2}, True), (PHI2 | TP2, {}, False)):
        command = translate(config, BuildOptions(**options), "0.11.0", weights=weights)
        assert command.tp_size == 2
        assert "--tp_size 2 --pp_size 1" in " ".join(command.flags)
    assert translate(PHI2 | TP2, BuildOptions(), "0.12.0").flags == ()


# Phi-3-small's block sparsity


@pytest.mark.parametrize(
    ("version", "options", "disabled"),
    [
        (GUIDES_COMMIT, {}, False),  # prompts of 1024 at most
        (GUIDES_COMMIT, {"max_input_len": 1025}, True),
        ("0.11.0", {}, True),  # prompts of 8191
        ("1.2.1", {"max_input_len": 1024, "max_output_len": 1024}, True),
        ("1.2.1", {"max_seq_len": 1026}, True),
        ("1.2.1", {"max_seq_len": 1025}, False),
    ],
)
def test_long_prompts_disable_fused_attention(version, options, disabled):
    command = translate(SMALL, BuildOptions(**options), version)
    assert ("--context_fmha disable" in " ".join(command.flags)) == disabled
    assert len(command.notes) == disabled


def test_fused_attention_stays_enabled():
    enabled = translate(SMALL, BuildOptions(context_fmha=True), "1.2.1")
    assert enabled.flags == ("--context_fmha", "enable")
    assert enabled.notes == ()
    assert flags(SMALL | {"dense_attention_every_n_layers": 1}, "1.2.1") == ""


def test_an_option_without_effect_is_noted():
    command = translate(SMALL, BuildOptions(context_fmha_fp32_acc=True), "1.2.1")
    assert command.flags == ("--context_fmha", "disable")
    assert command.run_options == {}
    assert "--context-fmha-fp32-acc" in command.notes[1]


# Refusals


@pytest.mark.parametrize(
    ("config", "options", "names"),
    [
        (MINI, {"max_output_len": 8, "max_seq_len": 8}, "--max-new-tokens and --max-seq-len"),
        (MINI, {"max_input_len": 4097}, "4096"),
        (MINI, {"max_output_len": 4000}, "5024"),
        (MINI, {"max_input_len": 512, "max_seq_len": 512}, "512"),
        (MINI, {"gemm_plugin": "float16"}, "bfloat16"),
        (PHI2, {"gpt_attention_plugin": "bfloat16"}, "float16"),
        (MINI, {"gemm_plugin": "fp8"}, "--gemm-plugin fp8"),
        (MINI, {"use_fp8_context_fmha": True}, "--use-fp8-context-fmha"),
        (MINI, {"context_fmha": False, "context_fmha_fp32_acc": True}, "--context-fmha-fp32-acc"),
        (MINI | FP8, {"context_fmha": False, "use_fp8_context_fmha": True}, "--use-fp8-context"),
        (MINI, {"gpt_attention_plugin": "disable", "context_fmha": True}, "attention plugin"),
        (MINI, {"extra": ("--output_dir=x",)}, "--output_dir"),
        (MINI, {"extra": ("--max-seq", "8")}, "--max_seq_len"),
    ],
)
def test_contradictions(config, options, names):
    with pytest.raises(UsageError) as caught:
        translate(config, BuildOptions(**options), "1.2.1")
    assert names in caught.value.message
    assert caught.value.hint


def test_a_length_that_old_releases_cannot_take():
    with pytest.raises(UsageError):
        translate(MINI, BuildOptions(max_seq_len=1000), "0.10.0")


@pytest.mark.parametrize(
    ("config", "refused", "read"),
    [(SMALL, "0.10.0", GUIDES_COMMIT), (MEDIUM, "0.10.0", GUIDES_COMMIT), (MOE, "0.13.0", "0.14")],
)
def test_models_that_a_release_cannot_read(config, refused, read):
    with pytest.raises(EngineError) as caught:
        translate(config, BuildOptions(), refused)
    assert refused in caught.value.message
    translate(config, BuildOptions(), read)


@pytest.mark.parametrize(
    ("version", "kind"),
    [("0.9.0", EngineError), ("1.3.0rc21", EngineError), ("newest", UsageError)],
)
def test_versions_that_cannot_build(version, kind):
    with pytest.raises(kind) as caught:
        release_of(version)
    assert version in caught.value.message
    assert caught.value.hint
