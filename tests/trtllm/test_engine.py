"""Reading an engine directory, as TensorRT-LLM's builders of three generations write it."""

import json

import pytest

from phireg.errors import CheckError, SourceError, UsageError
from phireg.executor import Sampling
from phireg.files.kinds import ENGINE, kind_of
from phireg.generation.backend import Options, Request
from phireg.generation.limits import check_request
from phireg.trtllm.engine import Engine, read_engine
from phireg.trtllm.runtime import describe

MAPPING = {"world_size": 2, "tp_size": 2, "pp_size": 1, "gpus_per_node": 8}
PRETRAINED = {"architecture": "PhiForCausalLM", "dtype": "float16", "vocab_size": 51200}
PRETRAINED["mapping"] = MAPPING
BUILD = {"max_input_len": 1024, "max_seq_len": 2048, "max_batch_size": 8, "max_beam_width": 3}


@pytest.fixture
def write(tmp_path):
    def write_engine(config=None, ranks=2, run_options=None):
        directory = tmp_path / "engine"
        directory.mkdir(exist_ok=True)
        whole = {"version": "0.17.0", "pretrained_config": PRETRAINED, "build_config": BUILD}
        (directory / "config.json").write_text(json.dumps(whole | (config or {})))
        for rank in range(ranks):
            (directory / f"rank{rank}.engine").write_bytes(b"x")
        if run_options is not None:
            (directory / "phireg-build.json").write_text(json.dumps({"run_options": run_options}))
        return directory

    return write_engine


def test_the_description_of_an_engine(write):
    directory = write(run_options={"enable_context_fmha_fp32_acc": True})
    engine = read_engine(directory)
    assert kind_of(directory) is ENGINE
    assert engine == Engine(
        directory=directory, version="0.17.0", architecture="PhiForCausalLM", dtype="float16",
        vocab_size=51200, tp_size=2, world_size=2, max_batch_size=8, max_input_len=1024,
        max_seq_len=2048, max_beam_width=3, gathers_logits=False,
        run_options={"enable_context_fmha_fp32_acc": True}, build_config=BUILD,
    )  # fmt: skip


def test_engines_of_other_builders(write):
    assert read_engine(write()).run_options == {}
    gathers = BUILD | {"gather_context_logits": True}
    assert read_engine(write({"build_config": gathers})).gathers_logits is True
    # before 0.11 the new tokens were limited
    old = {"max_input_len": 1000, "max_output_len": 24, "max_batch_size": 1, "max_beam_width": 1}
    assert read_engine(write({"build_config": old})).max_seq_len == 1024


@pytest.mark.parametrize(
    ("config", "ranks", "names"),
    [
        ({}, 1, "rank1.engine"),
        ({"pretrained_config": None}, 2, "pretrained_config"),
        ({"build_config": {}}, 2, "max_input_len"),
        ({"build_config": BUILD | {"max_seq_len": 0}}, 2, "max_seq_len"),
        ({"version": 1}, 2, "version"),
        ({"pretrained_config": PRETRAINED | {"mapping": {"world_size": 10**9}}}, 2, "world_size"),
    ],
)
def test_incomplete_engines(write, config, ranks, names):
    with pytest.raises((CheckError, SourceError)) as caught:
        read_engine(write(config, ranks))
    assert names in caught.value.message
    with pytest.raises(SourceError, match="run_options"):
        read_engine(write(run_options=[]))


def test_a_checkpoint_is_no_engine(checkpoint):
    assert kind_of(checkpoint) is not ENGINE
    with pytest.raises(SourceError) as caught:
        read_engine(checkpoint)
    assert "phireg build" in caught.value.hint


IN_FLIGHT = {
    "kv_cache_type": "PAGED",
    "plugin_config": {"gpt_attention_plugin": "auto", "remove_input_padding": True},
}


@pytest.mark.parametrize(
    ("build", "lengths", "refused"),
    [
        ({}, [1024], None),
        ({"max_num_tokens": None}, [1024], None),
        ({"max_num_tokens": 600}, [600], None),
        ({"max_num_tokens": 600}, [601], "prompts of 600"),
        ({"max_num_tokens": 8192}, [1025], "prompts of 1024"),
        ({"max_num_tokens": 600}, [400, 201], "601 tokens together"),  # ModelRunner: one step
        ({"max_num_tokens": 600} | IN_FLIGHT, [400, 201], None),
    ],
    ids=str,
)
def test_prompts_beyond_a_step_are_refused(build, lengths, refused, write):
    description = describe(write({"build_config": BUILD | build}), Options())
    request = Request([[5] * length for length in lengths], 9, (), Sampling())
    if refused is None:
        check_request(description, request)
    else:
        with pytest.raises(UsageError, match=refused):
            check_request(description, request)
