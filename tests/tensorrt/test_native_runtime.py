"""Running engines, by a stand-in of TensorRT's runtime that evaluates the network."""

import math
import shutil

import pytest
import torch
from standin import write_engine
from tiny_checkpoints import MAKERS

import phireg
from phireg import demo
from phireg.errors import PhiregError, UsageError
from phireg.executor import Sampling, generate, load
from phireg.files.kinds import tokenizer_files
from phireg.generation.backend import Options, Request
from phireg.summarization.models import choose_models
from phireg.summarization.task import Settings
from phireg.tensorrt import runtime

LENGTHS = (12, 21, 40)  # chunks have 16 tokens; the first crosses long rope's switch


def prompts(vocab_size, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("weights", ("embedded", "separate"))
@pytest.mark.parametrize("family", MAKERS)
def test_the_executors_tokens(engines, checkpoints, family, weights):
    executor = load(checkpoints(family))
    rows = prompts(executor.spec.vocab_size)
    expected = [generate(executor, [row], 12)[0] for row in rows]
    backend = runtime.load(engines(family, weights=weights), Options())
    assert backend.generate(Request(rows, 12, (), Sampling())) == expected
    (loaded,) = engines.loaded
    assert loaded.executions == {"prompt": 3, "generation": 11}
    stops = {expected[0][4], expected[2][7]}
    ended = [
        row[: next((n for n, token in enumerate(row) if token in stops), len(row))]
        for row in expected
    ]
    assert backend.generate(Request(rows, 12, stops, Sampling())) == ended


def test_sampling_is_the_executors(engines, checkpoints):
    executor = load(checkpoints("phi3-medium"))
    rows = prompts(executor.spec.vocab_size, (9, 9))
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=7)
    backend = runtime.load(engines("phi3-medium"), Options())
    expected = generate(executor, rows, 10, (), sampling)
    assert backend.generate(Request(rows, 10, (), sampling)) == expected


def test_scores_of_continuations(engines, checkpoints):
    executor = load(checkpoints("phi3-mini"))
    row = prompts(executor.spec.vocab_size, (50,))[0]
    backend = runtime.load(engines("phi3-mini"), Options())
    (actual,) = backend.mean_nll([row[:30]], [row[30:]])
    logits = executor(torch.tensor([row]))[0, 29:-1].log_softmax(-1)
    expected = -logits.gather(1, torch.tensor(row[30:])[:, None]).mean()
    assert math.isclose(actual, float(expected), rel_tol=1e-4)


def test_limits_and_options(engines, checkpoints):
    directory = engines("phi2")
    backend = runtime.load(directory, Options())
    rows = prompts(100, (5, 5, 5, 5))
    for request in (
        Request(rows, 4, (), Sampling()),
        Request([[1] * 61], 4, (), Sampling()),
        Request([[1] * 50], 40, (), Sampling()),
        Request(rows[:1], 4, (), Sampling(), num_beams=2),
    ):
        with pytest.raises(UsageError):
            backend.generate(request)
    with pytest.raises(UsageError):
        runtime.describe(directory, Options(dtype="float32"))
    with pytest.raises(PhiregError, match="weights"):
        runtime.load(directory, Options(weights_dir=checkpoints("phi2")))


def test_weights_of_another_shape(engines, checkpoints):
    directory = engines("phi2", weights="separate")
    with pytest.raises(PhiregError, match="shape"):
        runtime.load(directory, Options(weights_dir=checkpoints("phi3-mini")))


def test_run_takes_an_engine(engines, checkpoints):
    directory = engines("phi3-small")
    executor = load(checkpoints("phi3-small"))
    rows = prompts(executor.spec.vocab_size)
    completions = phireg.generate(directory, rows, max_new_tokens=6, batch_size=2)
    expected = [tuple(generate(executor, [row], 6)[0]) for row in rows]
    assert [completion.tokens for completion in completions] == expected
    with pytest.raises(PhiregError, match="tensorrt"):
        phireg.generate(directory, rows, backend="tensorrt-llm")


def test_summarize_takes_an_engine(package, engines, tmp_path):
    """A demo model's summaries and perplexities, from its engine and from its checkpoint."""
    checkpoint = tmp_path / "checkpoint"
    demo.convert(demo.find("phi3-medium"), checkpoint)
    limits = {"max_input_len": 200, "max_seq_len": 240, "max_chunk_len": 64}
    engine = write_engine(package, tmp_path / "engine", checkpoint, **limits)
    for file in tokenizer_files(checkpoint):
        shutil.copy(file, engine)
    models = choose_models([checkpoint, engine], None, ["executor", "engine"], Options())
    assert [model.backend for model in models] == ["executor", "tensorrt"]
    settings = Settings(max_ite=2, output_len=30, eval_ppl=True)
    results = phireg.summarize(models, settings).backends
    ours, native = results
    assert native.name == "tensorrt"
    assert native.rouge == ours.rouge
    assert native.perplexity == pytest.approx(ours.perplexity, rel=1e-2)
