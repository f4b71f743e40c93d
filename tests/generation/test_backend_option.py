"""`phireg run --backend`: the source model beside its checkpoint; wrong combinations."""

import json

import pytest
from helpers.tokenized_models import SOURCES, continuation, eos_ids

PROMPTS = ("The engine", "Wer liest die Straße? 日本語", "déjà")


@pytest.mark.parametrize("family", SOURCES)
def test_the_source_model_says_what_the_checkpoint_says(family, models, document):
    it = models(family)
    flags = [word for prompt in PROMPTS for word in ("--input_text", prompt)]
    flags += ["--max-new-tokens", 10]
    expected = [
        continuation(it.model, it.tokenizer, prompt, 10, eos_ids(it.source)) for prompt in PROMPTS
    ]
    for way in ((it.source, "--backend", "hf"), ("--hf_model_dir", it.source)):
        output = document(*way, *flags)
        keys = ("tokens", "text", "finish_reason", "input_ids", "batch", "prompt")
        assert [(row["tokens"], row["text"]) for row in output["results"]] == expected
        assert (output["backend"], output["dtype"], output["device"]) == ("hf", "float32", "cpu")
        assert (output["model_dir"], output["checkpoint_dir"]) == (str(it.source), None)
    other = document(it.checkpoint, *flags, "--backend", "executor")
    for row, same in zip(output["results"], other["results"], strict=True):
        assert [row[key] for key in keys] == [same[key] for key in keys]
    assert output["stop_ids"] == other["stop_ids"]
    half = document(it.source, *flags, "--backend", "hf", "--data_type", "bf16")
    assert half["dtype"] == "bfloat16"


def test_text_and_chat_of_the_source_model(models, run):
    it = models("phi3")
    flags = ("--prompt", PROMPTS[0], "--max-new-tokens", 9)
    plain = run(it.checkpoint, *flags)
    assert plain.exit_code == 0
    assert run(it.source, "--backend", "hf", *flags, "--streaming").stdout == plain.stdout
    lines = b"Wer?\nWhy?\n/exit\n"
    chats = [
        run(*way, "--chat", "--max-new-tokens", 6, stdin=lines)
        for way in ((it.checkpoint,), ("--model-dir", it.source))
    ]
    assert chats[0].exit_code == chats[1].exit_code == 0
    assert chats[0].stdout == chats[1].stdout
    assert len(chats[0].stdout.splitlines()) >= 2


def test_beams(models, run, document):
    it = models("phi3")
    where = (it.source, "--backend", "hf")
    flags = ("--prompt", "The", "--prompt", "Wer", "--max-new-tokens", 5, "--num-beams", 4)
    output = document(*where, *flags)
    for row in output["results"]:
        assert len(row["tokens"]) == 5
        assert row["finish_reason"] == "length"
    assert output["batches"][0]["tokens_per_second"] is None
    assert output["num_beams"] == 4
    alone = run(*where, *flags[:2], *flags[4:])
    assert alone.stdout == output["results"][0]["text"] + "\n"
    assert run(it.checkpoint, *flags).exit_code == 2


@pytest.mark.parametrize(
    ("args", "code", "names"),
    [
        (["{checkpoint}", "--backend", "hf"], 4, "--backend executor"),
        (["{checkpoint}", "--backend", "tensorrt-llm"], 4, "phireg build {checkpoint}"),
        (["{source}", "--backend", "tensorrt-llm"], 4, "phireg convert"),
        (["{source}"], 4, "--backend hf"),
        (["{checkpoint}", "--backend", "vllm"], 2, "executor, tensorrt-llm, hf"),
        (["{checkpoint}", "--model-dir", "{source}"], 2, "--model-dir"),
        (["--model-dir", "{source}", "--backend", "executor"], 2, "--model-dir"),
        (["--engine-dir", "{checkpoint}"], 4, "phireg build {checkpoint}"),
        (["--engine-dir", "{checkpoint}", "--backend", "hf"], 2, "--engine-dir"),
        ([], 2, "give a checkpoint"),
        (["{source}", "--backend", "hf", "--tp", "2"], 2, "--tp"),
        (["{checkpoint}", "--streaming", "--json"], 2, "--streaming and --json"),
        (["{checkpoint}", "--streaming", "--prompt", "y"], 2, "--streaming"),
        (["nowhere", "--backend", "hf"], 3, "nowhere"),
        (["nowhere"], 2, "nowhere"),
        (["{engine}", "--backend", "executor"], 4, "--backend tensorrt-llm"),
        (["{empty}"], 4, "{empty}"),
    ],
)
def test_other_combinations_are_refused(args, code, names, models, run, tmp_path):
    paths = {"checkpoint": models("phi3").checkpoint, "source": models("phi3").source}
    paths |= {"engine": tmp_path / "engine", "empty": tmp_path / "empty"}
    paths["empty"].mkdir()
    paths["engine"].mkdir()
    (paths["engine"] / "config.json").write_text('{"pretrained_config": {}, "build_config": {}}')
    result = run(*(word.format(**paths) for word in args), "--prompt", "x")
    assert result.exit_code == code, result.output
    assert names.format(**paths) in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_a_source_model_without_its_numbers_or_in_two_processes(models, run, tmp_path, monkeypatch):
    config = json.loads((models("phi3").source / "config.json").read_text())
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(tmp_path, "--backend", "hf", "--prompt", "x")
    assert result.exit_code == 4
    assert "vocab_size" in result.stderr
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(models("phi3").source, "--backend", "hf", "--prompt", "x")
    assert result.exit_code == 2
    assert "without torchrun" in " ".join(result.stderr.split())
