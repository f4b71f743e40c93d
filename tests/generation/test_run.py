"""`phireg run` against transformers' own generate on the source model; wrong combinations."""

import json
from dataclasses import asdict
from shutil import copytree

import pytest
import torch
from helpers.tokenized_models import SOURCES, continuation, eos_ids

import phireg
from phireg.device import pick_device
from phireg.errors import UsageError

PROMPTS = ("The engine", "Wer liest die Straße? 日本語", "déjà")
FLAGS = [word for prompt in PROMPTS for word in ("--prompt", prompt)]


@pytest.mark.parametrize("family", SOURCES)
def test_checkpoint_and_source_model_say_the_same(family, models, run, document):
    it = models(family)
    expected = [
        continuation(it.model, it.tokenizer, prompt, 10, eos_ids(it.source)) for prompt in PROMPTS
    ]
    assert len({text for _, text in expected}) == len(PROMPTS)
    flags = [*FLAGS, "--max_output_len", 10]
    output = document(it.checkpoint, *flags)
    ways = ((it.source, "--backend", "hf"), ("--hf_model_dir", it.source))
    sources = [document(*way, *flags) for way in ways]
    for source in sources:
        assert (source["backend"], source["dtype"], source["device"]) == ("hf", "float32", "cpu")
        assert (source["model_dir"], source["checkpoint_dir"]) == (str(it.source), None)
        assert source["results"] == output["results"]
        assert source["stop_ids"] == output["stop_ids"]
    rows = output["results"]
    assert [(row["tokens"], row["text"]) for row in rows] == expected
    assert [row["input_ids"] for row in rows] == [it.tokenizer(p)["input_ids"] for p in PROMPTS]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert document(*ways[0], *flags, "--data_type", "bf16")["dtype"] == "bfloat16"
    alone = run(it.checkpoint, *flags[:2], *flags[-2:])
    assert (alone.exit_code, alone.stdout) == (0, expected[0][1] + "\n")


def test_the_function_gives_what_the_command_gives(models, document):
    it = models("phi3")
    rows = document(it.checkpoint, *FLAGS, "--max-new-tokens", 6, "--batch-size", 2)["results"]
    completions = phireg.generate(
        it.checkpoint, PROMPTS, max_new_tokens=6, batch_size=2, options=phireg.Options("cpu")
    )
    assert [json.loads(json.dumps(asdict(one))) for one in completions] == rows
    ids = [it.tokenizer(PROMPTS[0])["input_ids"]]
    (source,) = phireg.generate(it.source, ids, backend="hf", max_new_tokens=6)
    assert source.tokens == completions[0].tokens
    with pytest.raises(UsageError, match=r"^prompt 1: "):
        phireg.generate(it.checkpoint, ["word " * 300])


def test_all_ways_in_give_the_same(models, run, document, tmp_path):
    ckpt = models("phi3").checkpoint
    text = "one line\nand another"
    first = run(ckpt, "--prompt", text, "--max-new-tokens", 5)
    assert first.exit_code == 0
    piped = run(ckpt, "--max-new-tokens", 5, stdin=f"{text}\n".encode())
    assert piped.stdout == first.stdout
    ids = models("phi3").tokenizer(text)["input_ids"]
    lines = [json.dumps({"prompt": text}), json.dumps({"input_ids": ids})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    results = document(ckpt, "--input-file", tmp_path / "in.jsonl", "--max-new-tokens", 5)
    assert [row["text"] + "\n" for row in results["results"]] == [first.stdout] * 2
    (tmp_path / "in.txt").write_text("one line\n\nand another\n")
    for options in ({}, {"stdin": (tmp_path / "in.txt").read_bytes()}):
        name = "-" if options else tmp_path / "in.txt"
        results = document(ckpt, "--input-file", name, "--max-new-tokens", 5, **options)
        assert [row["prompt"] for row in results["results"]] == ["one line", "and another"]


def test_batches_change_nothing_but_the_timings(models, document):
    it = models("phi3")
    whole = document(it.checkpoint, *FLAGS, "--max-new-tokens", 6)
    parts = document(it.checkpoint, *FLAGS, "--max-new-tokens", 6, "--batch-size", 2)
    assert [row["tokens"] for row in whole["results"]] == [r["tokens"] for r in parts["results"]]
    assert [row["batch"] for row in parts["results"]] == [0, 0, 1]
    assert [batch["prompts"] for batch in parts["batches"]] == [2, 1]
    assert [batch["new_tokens"] for batch in parts["batches"]] == [12, 6]
    single = document(it.checkpoint, "--prompt", "x", "--max-new-tokens", 1)
    assert single["batches"][0]["tokens_per_second"] is None
    assert (whole["tp_size"], whole["processes"], whole["device"]) == (2, 1, "cpu")


def test_stop_ids_of_generation_config_end_a_text(models, altered, document, run):
    it = models("phi3")
    free, _ = continuation(it.model, it.tokenizer, "The engine", 12)
    stop = next(token for n, token in enumerate(free) if n > 2 and token not in free[:n])
    (altered / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, stop]}))
    flags = ("--prompt", "The engine", "--prompt", PROMPTS[1], "--max-new-tokens", 12)
    stopped, other = document(altered, *flags)["results"]
    assert stopped["tokens"] == free[: free.index(stop) + 1]
    assert stopped["finish_reason"] == "stop"
    assert (other["finish_reason"], len(other["tokens"])) == ("length", 12)
    expected = continuation(it.model, it.tokenizer, "The engine", 12, [3, stop])
    assert (stopped["tokens"], stopped["text"]) == expected
    assert run(altered, *flags[:2], *flags[4:]).stdout == expected[1] + "\n"


def test_sampling(models, document):
    ckpt = models("phi3").checkpoint

    def tokens(*flags):
        output = document(ckpt, "--prompt", "The", "--max-new-tokens", 20, *flags)
        return output["results"][0]["tokens"]

    greedy = tokens()
    assert tokens("--temperature", 0) == tokens("--top-k", 1) == greedy
    hot = tokens("--temperature", 1.5, "--seed", 3)
    assert hot == tokens("--temperature", 1.5, "--random_seed", 3) != greedy
    assert hot != tokens("--temperature", 1.5, "--seed", 4)
    assert tokens("--top-p", 1e-6, "--temperature", 2) == greedy

    # seeds differ from batch to batch
    flags = ("--prompt", "The", "--prompt", "The", "--temperature", 1.5, "--max-new-tokens", 12)
    first, second = document(ckpt, *flags, "--batch-size", 1)["results"]
    assert first["tokens"] != second["tokens"]


def test_dtype_and_offload(models, document):
    command = (models("phi3").checkpoint, "--prompt", "The", "--max-new-tokens", 4)
    plain, off = document(*command), document(*command, "--offload")
    assert plain["results"] == off["results"]
    half = document(*command, "--dtype", "bfloat16")
    assert (plain["dtype"], half["dtype"]) == ("float32", "bfloat16")


def test_token_ids_need_no_tokenizer(models, altered, run, document, tmp_path):
    it = models("phi3")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (altered / name).unlink()
    ids = [5, 6, 300, 7]
    (tmp_path / "in.jsonl").write_text('{"input_ids": [5, 6, 300, 7]}')
    flags = ("--input-file", tmp_path / "in.jsonl", "--max-new-tokens", 6)
    expected, _ = continuation(it.model, it.tokenizer, torch.tensor([ids]), 6, eos_ids(it.source))
    (row,) = document(altered, *flags)["results"]
    assert (row["tokens"], row["text"], row["prompt"]) == (expected, None, None)
    assert run(altered, *flags).stdout == f"[1/1] 4 token ids\n{expected}\n\n"
    failed = run(altered, "--prompt", "x")
    assert failed.exit_code == 2
    assert "carries no tokenizer" in failed.stderr
    assert "--tokenizer-dir" in failed.stderr
    _, text = continuation(it.model, it.tokenizer, "The", 6, eos_ids(it.source))
    flags = ("--prompt", "The", "--max-new-tokens", 6, "--tokenizer-dir", it.source)
    assert run(altered, *flags).stdout == text + "\n"


def test_positions(models, run, document):
    it = models("phi3")  # 256 positions
    prompt = "The engine " * 40
    length = len(it.tokenizer(prompt)["input_ids"])
    room = 256 - length
    assert 0 < room < 128
    (row,) = document(it.checkpoint, "--prompt", prompt)["results"]
    assert len(row["tokens"]) == room
    assert run(it.checkpoint, "--prompt", prompt * 2).exit_code == 2


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--prompt", "x", "--chat"], "--prompt and --chat"),
        (["--prompt", "x", "--input-file", "y"], "--prompt and --input-file"),
        (["--prompt", ""], "--prompt 1"),
        ([], "standard input"),
        (["--chat", "--json"], "--json and --chat"),
        (["--prompt", "x", "--system", "y"], "--chat"),
        (["--prompt", "x", "--top-k", "-1"], "top_k"),
        (["--prompt", "x", "--top-p", "0"], "top_p"),
        (["--prompt", "x", "--temperature", "0", "--top-k", "3"], "--temperature 0"),
        (["--prompt", "x", "--seed", "-1"], "--seed -1"),
        (["--prompt", "x", "--tp", "3"], "--tp-size 2"),
        (["--prompt", "x", "--tokenizer-dir", "nowhere"], "nowhere"),
        (["--input-file", "nowhere"], "nowhere"),
        (["--input-file", "-"], "standard input"),
    ],
)
def test_wrong_usage(args, names, models, run):
    result = run(models("phi3").checkpoint, *args)
    assert result.exit_code == 2
    assert names in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", "cuda:99"])
def test_other_devices_are_refused_with_those_available(device):
    with pytest.raises(UsageError, match=device.removeprefix("cuda:")) as caught:
        pick_device(device)
    assert "available here: cpu" in caught.value.hint


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
        (["{checkpoint}", "--backend", "hf"], 3, "--backend executor"),
        (["{checkpoint}", "--backend", "tensorrt-llm"], 3, "phireg build {checkpoint}"),
        (["{source}", "--backend", "tensorrt-llm"], 3, "phireg convert"),
        (["{source}", "--backend", "executor"], 3, "--backend hf"),
        (["{checkpoint}", "--backend", "vllm"], 2, "executor, tensorrt-llm, tensorrt, hf"),
        (["{checkpoint}", "--model-dir", "{source}"], 2, "--model-dir"),
        (["--model-dir", "{source}", "--backend", "executor"], 2, "--model-dir"),
        (["--engine-dir", "{checkpoint}"], 3, "phireg build {checkpoint}"),
        (["--engine-dir", "{checkpoint}", "--backend", "hf"], 2, "--engine-dir"),
        ([], 2, "give a checkpoint"),
        (["{source}", "--backend", "hf", "--tp", "2"], 2, "--tp"),
        (["{checkpoint}", "--streaming", "--json"], 2, "--streaming and --json"),
        (["{checkpoint}", "--streaming", "--prompt", "y"], 2, "--streaming"),
        (["{engine}", "--backend", "executor"], 3, "--backend tensorrt-llm"),
    ],
)
def test_other_combinations_are_refused(args, code, names, models, run, tmp_path):
    paths = {"checkpoint": models("phi3").checkpoint, "source": models("phi3").source}
    paths |= {"engine": tmp_path / "engine"}
    paths["engine"].mkdir()
    (paths["engine"] / "config.json").write_text('{"pretrained_config": {}, "build_config": {}}')
    result = run(*(word.format(**paths) for word in args), "--prompt", "x")
    assert result.exit_code == code, result.output
    assert names.format(**paths) in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_a_source_model_without_its_numbers_or_in_two_processes(models, run, tmp_path, monkeypatch):
    config = json.loads((models("phi3").source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": "many"}))
    result = run(tmp_path, "--backend", "hf", "--prompt", "x")
    assert result.exit_code == 3
    assert "vocab_size" in result.stderr
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(models("phi3").source, "--backend", "hf", "--prompt", "x")
    assert result.exit_code == 2
    assert "without torchrun" in " ".join(result.stderr.split())


def test_a_source_model_that_can_be_read_in_two_ways(models, run, tmp_path):
    copytree(models("phi3").source, tmp_path / "two")
    (tmp_path / "two" / "adapter_model.safetensors").touch()
    result = run(tmp_path / "two", "--backend", "hf", "--prompt", "x")
    assert result.exit_code == 3
    told = " ".join(result.stderr.split())
    assert "adapter_model.safetensors" in told and "phireg convert" in told
