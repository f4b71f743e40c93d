"""phireg summarize with a fake backend: what it prints, keeps, checks and refuses."""

import json
import math
import re
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

import phireg
from phireg import demo
from phireg.data import rows as data_rows
from phireg.generation.tokenizer import find_tokenizer
from phireg.report.summary import render_summarization
from phireg.summarization.result import BackendResult, Summarization, Summary, Thresholds, rouge
from phireg.summarization.task import Sample, Settings

PASSING = ("--tensorrt_llm_rouge1_threshold", 5)


@pytest.fixture
def args(checkpoint, fake):
    return [checkpoint("phi3-mini"), "--backend", "fake", "--max-ite", 3, "--batch-size", 2]


def test_prompts_and_scores(args, document, fake):
    output = document(*args, "--eval_ppl", "--output_len", 50)
    model = demo.find("phi3-mini")
    tokenizer = find_tokenizer(model.directory)
    prompts = [tuple(tokenizer.encode(a.text + " TL;DR:")) for a in model.articles[:6]]
    batches = [prompts[0:2], prompts[2:4], prompts[4:6]]
    assert [[prompts[0]], *batches] == fake.CALLS  # the warm-up comes first
    assert [a["where"] for a in output["articles"]] == [f"article {n}" for n in range(6)]
    for article, prompt in zip(output["articles"], prompts, strict=True):
        (summary,) = article["summaries"]
        assert summary["new_tokens"] == 5 + len(prompt) % 7
        assert summary["summary"] == tokenizer.decode(prompt[: summary["new_tokens"]])
    (backend,) = output["backends"]
    assert backend["perplexity"] == pytest.approx((math.exp(0.5) + math.exp(1.5)) / 2)
    assert backend["new_tokens"] == sum(5 + len(prompt) % 7 for prompt in prompts)
    assert backend["peak_memory_bytes"] == 4000
    assert "held-back" in output["data"]
    assert output["passed"] is None  # nothing was checked


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--tensorrt_llm_rouge1_threshold", 99), 4),
        (("--tensorrt_llm_rouge1_threshold", "nan"), 4),
        (PASSING, 0),
        (("--check-backend", "fake", "--tensorrt_llm_rouge1_threshold", 99), 4),
        ((*PASSING, "--eval_ppl"), 0),
        ((*PASSING, "--eval_ppl", "--tensorrt_llm_ppl_threshold", 2), 4),
    ],
)
def test_a_threshold_decides_the_exit_code(options, code, args, run, monkeypatch):
    monkeypatch.setenv("INTEGRATION_TEST", "1")  # upstream's switch has no effect
    result = run(*args, "--check_accuracy", *options)
    assert result.exit_code == code, result.output
    assert ("FAILED" in result.stdout) == (code == 4)


def test_a_check_without_its_articles_is_an_error(args, run, monkeypatch, tmp_path, fake):
    monkeypatch.setattr(demo, "family_of", lambda directories: None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(data_rows, "_unavailable", lambda: "there is no network")
    report = tmp_path / "r.html"
    result = run(*args, "--check-accuracy", "--report", report)
    assert result.exit_code == 3
    assert "pip install" in result.stderr
    assert fake.CALLS == []
    assert not report.exists()

    result = run(*args, "--report", report)
    assert result.exit_code == 0
    for text in (result.stdout, report.read_text()):
        assert "there is no network" in text
        assert not re.search(r"above the threshold|passed", text.split("<body>")[-1])


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
    ("options", "names"),
    [
        (("--tensorrt-llm-rouge1-threshold", 20), "--check-accuracy"),
        (("--check-backend", "fake"), "--check-accuracy"),
        (("--check-accuracy", "--tensorrt-llm-ppl-threshold", 9), "--eval-ppl"),
        (("--check-accuracy", "--check-backend", "hf"), "--check-backend hf"),
        (("--backend", "nothing"), "'nothing'"),
        (("--test-hf",), "--model-dir"),
        (("--test-trt-llm",), "--engine-dir"),
        (("--max-input-length", 600, "--output-len", 500), "to 12 tokens"),
        (("--batch-size", 9), "--batch-size 8"),
        (("--num-beams", 3), "--num-beams 2"),
        (("--tp", 2), "--tp"),
        (("--dataset", "demo", "--dataset-dir", "/nowhere"), "--dataset-dir"),
        (("--report", "/nowhere/r.html"), "/nowhere"),
    ],
)
def test_impossible_options_are_refused_first(options, names, args, run, fake):
    result = run(*args, *options)
    assert result.exit_code == 2, result.output
    assert names in result.stderr
    assert fake.CALLS == []


def test_the_function_takes_thresholds_and_reports_progress(args, fake):
    calls = []
    result = phireg.summarize(
        [phireg.ModelRun("fake", args[0])],
        Settings(batch_size=2, max_ite=2),
        thresholds=Thresholds(["fake"], rouge1=99),
        progress=lambda *call: calls.append(call),
    )
    assert not result.passed
    assert calls == [("fake", 2, 4), ("fake", 2, 4)]


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        (
            ("--backend", "hf", "--hf-model-dir", "{source}", "--check-accuracy"),
            2,
            "--check-backend",
        ),
        (("--check-accuracy",), 2, "checkpoint"),
        (("{source}",), 3, "phireg convert --model-dir {source}"),
        (("{checkpoint}", "--engine-dir", "{checkpoint}"), 2, "checkpoint"),
    ],
)
def test_models_that_are_refused(options, code, names, checkpoint, run):
    paths = {"source": demo.find("phi3-mini").directory, "checkpoint": checkpoint("phi3-mini")}
    result = run(*(word.format(**paths) for word in options))
    assert result.exit_code == code
    assert names.format(**paths) in " ".join(result.stderr.split())


def test_another_model_is_named(args, document, recwarn):
    """Its scores are of text that the first model's tokenizer made."""
    both = (*args, "--backend", "fake", "--test-hf", "--max-ite", 1, "--dataset", "demo")
    for family, warned in (("phi3-medium", True), ("phi3-mini", False)):
        output = document(*both, "--model-dir", demo.find(family).directory)
        texts = [str(warning.message) for warning in recwarn]
        assert any("hidden_size is 128 and 192" in text for text in texts) == warned
        assert ("different models" in output["provenance"]) == warned
        recwarn.clear()


def test_weights_of_another_fine_tuning_are_named(args, document, recwarn, tmp_path):
    """Its sizes are the same, and so are the headers of its files."""
    source = shutil.copytree(demo.find("phi3-mini").directory, tmp_path / "tuned")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.01
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    both = (*args, "--backend", "fake", "--test-hf", "--max-ite", 1, "--dataset", "demo")
    output = document(*both, "--model-dir", source)
    assert any(str(source) in str(warning.message) for warning in recwarn)
    assert str(source) in output["provenance"]["different models"]


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
    assert "phireg" in re.search(r"<dt>command</dt><dd>(.*?)</dd>", page)[1]
    # The article whose summary shares no word with the reference stands first.
    assert page.index(f"{path}:2<") < page.index(f"{path}:1<")


def test_the_page_marks_what_differs():
    """Two backends that differ in one word of one article of three."""
    texts = ["A mill opened on Monday", "A mill closed", "A mill burned"]

    def result(name, *changes):
        written = [dict(changes).get(n, text) for n, text in enumerate(texts)]
        summaries = tuple(Summary(text, 4) for text in written)
        return BackendResult(name, "d", summaries, rouge(written, texts), (1.0,), None)

    samples = tuple(Sample(f"row {n}", "article", text, (1, 2)) for n, text in enumerate(texts))
    backends = (result("left"), result("right", (0, "A mill opened on Friday")))
    page = render_summarization(Summarization("data", None, Settings(), samples, backends))
    marked = re.findall(r'<mark class="([^"]*)">(\w+)</mark>', page.split("<h2>Articles")[1])
    assert marked[2:] == [("different", "Monday"), ("unknown different", "Friday")]
    assert page.index('id="article-0"') < page.index('id="article-1"')
    # A summary that both wrote stands there once, beside the reference.
    assert page.count("A mill closed") == 2
