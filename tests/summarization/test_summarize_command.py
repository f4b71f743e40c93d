"""phireg summarize with a fake backend: what it prints, keeps, checks and refuses."""

import json
import math

import pytest

from phireg import demo
from phireg.generation.tokenizer import find_tokenizer


@pytest.fixture
def args(checkpoint, fake):
    return [checkpoint("phi3-mini"), "--backend", "fake", "--max-ite", 3, "--batch-size", 2]


def test_what_the_backend_is_given_and_what_comes_of_it(args, document, fake):
    told = document(*args, "--eval_ppl", "--output_len", 50)
    model = demo.find("phi3-mini")
    tokenizer = find_tokenizer(model.directory)
    prompts = [tuple(tokenizer.encode(a.text + " TL;DR:")) for a in model.articles[:6]]
    batches = [prompts[0:2], prompts[2:4], prompts[4:6]]
    assert [[prompts[0]], *batches] == fake.CALLS  # the warm-up comes first
    assert [a["where"] for a in told["articles"]] == [f"article {n}" for n in range(6)]
    for article, prompt in zip(told["articles"], prompts, strict=True):
        (ours,) = article["summaries"]
        assert ours["new_tokens"] == 5 + len(prompt) % 7
        assert ours["summary"] == tokenizer.decode(prompt[: ours["new_tokens"]])
    (backend,) = told["backends"]
    assert backend["perplexity"] == pytest.approx((math.exp(0.5) + math.exp(1.5)) / 2)
    assert backend["new_tokens"] == sum(5 + len(prompt) % 7 for prompt in prompts)
    assert backend["peak_memory_bytes"] == 4000
    assert "held-back" in told["data"]
    assert told["passed"]


def test_the_table(args, run, tmp_path):
    result = run(*args, "--report", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the held-back split of phireg's demo models: 6 articles\n")
    assert [line.split()[0] for line in result.stdout.splitlines()[2:4]] == ["backend", "fake"]
    assert (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--tensorrt_llm_rouge1_threshold", 99), 4),
        (("--tensorrt_llm_rouge1_threshold", "nan"), 4),
        (("--tensorrt_llm_rouge1_threshold", 5), 0),
        (("--check-backend", "fake", "--tensorrt_llm_rouge1_threshold", 99), 4),
        (("--tensorrt_llm_rouge1_threshold", 5, "--eval_ppl"), 0),
        (
            (
                *("--tensorrt_llm_rouge1_threshold", 5),
                *("--eval_ppl", "--tensorrt_llm_ppl_threshold", 2),
            ),
            4,
        ),
    ],
)
def test_a_threshold_decides_the_exit_code(options, code, args, run, monkeypatch):
    monkeypatch.setenv("INTEGRATION_TEST", "1")  # upstream's switch has no effect
    result = run(*args, "--check_accuracy", *options)
    assert result.exit_code == code, result.output
    assert ("FAILED" in result.stdout) == (code == 4)


def test_an_unknown_perplexity_fails(args, run, fake):
    fake.NLL[0] = None
    options = ("--check-accuracy", "--eval-ppl", "--tensorrt-llm-rouge1-threshold", 1)
    result = run(*args, *options)
    assert result.exit_code == 4
    assert "no perplexity" in result.stdout


def test_a_killed_run_keeps_nothing(args, run, fake):
    fake.FAIL_AFTER[0] = 2
    result = run(*args)
    assert result.exit_code == 130
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensorrt-llm-rouge1-threshold", 20), "no effect without --check-accuracy"),
        (("--check-backend", "fake"), "no effect without --check-accuracy"),
        (
            ("--check-accuracy", "--tensorrt-llm-ppl-threshold", 9),
            "no effect without --eval-ppl",
        ),
        (("--check-accuracy", "--check-backend", "hf"), "is not run"),
        (("--backend", "nothing"), "unknown backend 'nothing'"),
        (("--test-hf",), "give --hf-model-dir"),
        (("--test-trt-llm",), "give --engine-dir"),
        (("--max-input-length", 600, "--output-len", 500), "to 12 tokens"),
        (("--batch-size", 9), "use --batch-size 8"),
        (("--num-beams", 3), "use --num-beams 2"),
        (("--tp", 2), "--tp is for the executor"),
        (("--dataset", "/nowhere.csv"), "cannot read /nowhere.csv"),
        (("--dataset-dir", "/nowhere"), "/nowhere: no such directory"),
        (("--dataset", "demo", "--dataset-dir", "/nowhere"), "give one of them"),
        (("--report", "/nowhere/r.html"), "no such directory: /nowhere"),
        (("--engine-dir", "/nowhere"), "no such directory"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, args, run, fake):
    result = run(*args, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert fake.CALLS == []


def test_only_hf_is_checked_when_it_is_named(checkpoint, run):
    source = demo.find("phi3-mini").directory
    result = run("--backend", "hf", "--hf-model-dir", source, "--check-accuracy")
    assert result.exit_code == 2
    assert "--check-backend hf" in result.stderr
    assert run("--check-accuracy").exit_code == 2


def test_a_source_model_in_the_place_of_a_checkpoint(run):
    source = demo.find("phi3-mini").directory
    result = run(source)
    assert result.exit_code == 2
    assert "is a Hugging Face model" in result.stderr
    assert f"phireg convert --model-dir {source}" in " ".join(result.stderr.split())


def test_a_second_checkpoint_is_refused(args, run):
    result = run(*args, "--engine-dir", args[0])
    assert result.exit_code == 2
    assert "checkpoint" in result.stderr


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_damaged_articles_are_named(name, args, run, tmp_path):
    path = tmp_path / name
    path.write_text({"a.jsonl": '{"article": "x"}\n', "a.csv": "article,text\nx,y\n"}[name])
    result = run(*args, "--dataset", path)
    assert result.exit_code == 2
    assert "no 'highlights'" in result.stderr


def test_the_page_is_whole_and_harmless(args, run, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["The <script>alert(1)</script> mill", "A theater opened"]
    lines = [json.dumps({"article": t, "highlights": "The <b>mill</b>"}) for t in texts]
    path.write_text("\n".join(lines))
    report = tmp_path / "r.html"
    options = ("--check-accuracy", "--tensorrt-llm-rouge1-threshold", 100)
    assert run(*args, "--dataset", path, "--report", report, *options).exit_code == 4
    page = report.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;mill&lt;/b&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert "threshold missed" in page
    # The article whose summary shares no word with the reference stands first.
    assert page.index(f"{path}:2<") < page.index(f"{path}:1<")
