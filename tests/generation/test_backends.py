"""Backends against each other, and against a loop over the source model."""

import math
import sys
from unittest.mock import Mock

import pytest
import torch
from helpers.tokenized_models import SOURCES

from phireg import generation as backends
from phireg.device import measure_memory, peak_memory
from phireg.errors import UsageError
from phireg.executor import Executor, Sampling
from phireg.generation import Description, Options, Request, describe, executor, open_backend

GREEDY = Sampling()
FLOAT = Options("cpu", "float32")
PROMPTS = [[5, 6, 7, 70, 71], [9], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]


def by_loop(model, prompt, count, stops=()):
    """Greedy new tokens of one prompt, each from a forward pass over all that came before."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def nll_by_loop(model, prompt, continuation):
    total = 0.0
    for n, token in enumerate(continuation):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *continuation[:n]]])
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].double()
        total -= math.log(float(logits.softmax(-1)[token]))
    return total / len(continuation)


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("name", ["executor", "hf"])
def test_greedy_and_likelihood_are_the_source_models(name, family, models):
    it = models(family, tp_size=1 if family == "phi2" else 2)
    model, source, checkpoint = it.model, it.source, it.checkpoint
    expected = [by_loop(model, prompt, 9) for prompt in PROMPTS]
    stop = expected[2][4]
    stopped = [by_loop(model, prompt, 9, {stop}) for prompt in PROMPTS]
    assert stopped != expected
    with open_backend(name, checkpoint if name == "executor" else source, FLOAT) as backend:
        assert (backend.name, backend.device, backend.dtype) == (name, "cpu", "float32")
        assert backend.processes == 1
        assert backend.generate(Request(PROMPTS, 9, (), GREEDY)) == expected
        assert backend.generate(Request(PROMPTS, 9, {stop, 300}, GREEDY)) == stopped
        assert backend.generate(Request(PROMPTS[:1], 9, (), GREEDY, 1)) == expected[:1]
        steps = list(backend.stream(Request(PROMPTS, 9, {stop}, GREEDY)))
        for row, tokens in enumerate(stopped):
            streamed = [step[row] for step in steps if step[row] is not None]
            assert streamed == tokens + [stop] * (len(tokens) < 9)
        means = backend.mean_nll(PROMPTS, [[3], [7, 8, 9, 10], [11, 12]])
        pairs = zip(PROMPTS, ([3], [7, 8, 9, 10], [11, 12]), strict=True)
        assert means == pytest.approx([nll_by_loop(model, *pair) for pair in pairs], rel=1e-5)
        assert backend.peak_memory() > 2**20


def test_beams_are_the_most_likely_of_all_texts(models):
    """With as many beams as there are tokens, two steps of beams see every text of two tokens."""
    model, source = models("phi3").model, models("phi3").source
    prompt = PROMPTS[0]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        count = len(first)
        ids = torch.tensor([[*prompt, token] for token in range(count)])
        second = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    best = int((first[:, None] + second).argmax())
    with open_backend("hf", source, FLOAT) as backend:
        assert backend.generate(Request([prompt], 2, (), GREEDY, count)) == [[*divmod(best, count)]]
        with pytest.raises(UsageError):
            backend.generate(Request([prompt], 2, (), Sampling(1.0), 2))


def test_hf_draws_by_seed_and_leaves_the_generator_alone(models):
    source = models("phi3").source
    before = torch.get_rng_state()
    with open_backend("hf", source, FLOAT) as backend:
        requests = [Request([[5, 6]], 12, (), Sampling(1.5, seed=n)) for n in (1, 1, 2)]
        hot = list(map(backend.generate, requests))
        assert hot[0] == hot[1] != hot[2]
        steps = list(backend.stream(Request([[5, 6]], 12, (), Sampling(1.5, seed=1))))
        assert [token for (token,) in steps] == hot[0][0]
        greedy = backend.generate(Request([[5, 6]], 12, (), GREEDY))
        assert backend.generate(Request([[5, 6]], 12, (), Sampling(1.5, top_k=1))) == greedy
        assert backend.generate(Request([[5, 6]], 12, (), Sampling(1.5, top_p=1e-9))) == greedy
        some = iter(backend.stream(Request([[5, 6]], 200, (), GREEDY)))
        assert [next(some)[0], next(some)[0]] == greedy[0][:2]
        some.close()  # its thread ends with it
    assert torch.equal(before, torch.get_rng_state())


def test_hf_computes_in_a_dtype_and_reads_layer_by_layer_what_it_reads_at_once(models):
    model, source = models("phi3-small").model, models("phi3-small").source
    with open_backend("hf", source, Options("cpu", "float32", offload=True)) as backend:
        expected = [by_loop(model, prompt, 4) for prompt in PROMPTS]
        assert backend.generate(Request(PROMPTS, 4, (), GREEDY)) == expected
    with open_backend("hf", models("phi2").source, Options("cpu", "bfloat16")) as backend:
        assert backend.model.dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["executor", "hf"])
@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda b: b.generate(Request([], 3, (), GREEDY)), "no tokens"),
        (lambda b: b.generate(Request([[]], 3, (), GREEDY)), "no tokens"),
        (lambda b: b.generate(Request([[1]], 0, (), GREEDY)), "max_new_tokens"),
        (lambda b: b.generate(Request([[1, 312]], 3, (), GREEDY)), "312"),
        (lambda b: b.generate(Request([[1] * 250], 7, (), GREEDY)), "256 positions"),
        (lambda b: list(b.stream(Request([[-1]], 3, (), GREEDY))), "-1"),
        (lambda b: b.generate(Request([[1]], 3, (), GREEDY, 0)), "num_beams"),
        (lambda b: b.mean_nll([[1]], [[]]), "no tokens"),
        (lambda b: b.mean_nll([[1] * 200], [[1] * 57]), "257 tokens"),
        (lambda b: b.mean_nll([[1]], [[999]]), "999"),
    ],
)
def test_both_refuse(name, call, names, models):
    source, checkpoint = models("phi3").source, models("phi3").checkpoint
    with open_backend(name, checkpoint if name == "executor" else source, FLOAT) as backend:
        with pytest.raises(UsageError, match=names):
            call(backend)
        assert len(backend.generate(Request([[1, 2]], 2, (), GREEDY))[0]) == 2  # and goes on


def test_descriptions(models):
    limits = describe("executor", models("phi3").checkpoint)
    assert (limits.vocab_size, limits.positions, limits.processes) == (312, 256, (1, 2))
    assert describe("hf", models("phi3").source) == Description(312, 256)


def test_a_further_backend_is_one_module(monkeypatch):
    module = Mock(describe=lambda directory, options: Description(10, 20))
    monkeypatch.setitem(sys.modules, "other", module)
    monkeypatch.setitem(backends.BACKENDS, "other", "other")
    assert describe("other", "model").positions == 20
    with open_backend("other", "model") as backend:
        assert backend is module.load.return_value
        backend.close.assert_not_called()
    backend.close.assert_called_once()


def test_peak_memory_falls_when_it_is_measured_anew():
    cpu = torch.device("cpu")
    block = bytearray(b"x") * (64 << 20)
    high = peak_memory(cpu)
    del block
    measure_memory(cpu)
    assert high > 64 << 20
    assert peak_memory(cpu) < high


def test_the_captured_step_goes_before_the_processes_part(monkeypatch):
    """NCCL waits, without end, for graphs that hold its operations."""
    order = []
    model = Mock(spec=Executor, device=torch.device("cpu"), dtype=torch.float32)
    model.spec = Mock()
    model.release.side_effect = lambda: order.append("release")
    monkeypatch.setattr(executor, "_description", lambda spec: None)
    monkeypatch.setattr(executor, "_exchange", lambda request: order.append(request))
    monkeypatch.setattr(executor.dist, "destroy_process_group", lambda: order.append("part"))
    executor.ExecutorBackend(model, leads_workers=True).close()
    assert order == [None, "release", "part"]

    order.clear()
    monkeypatch.setattr(executor, "_join", lambda device: None)
    monkeypatch.setattr(executor, "load_checkpoint", lambda *_, **__: model)
    monkeypatch.setattr(executor, "_exchange", lambda: None)
    executor.run_worker("anywhere", FLOAT)
    assert order == ["release", "part"]


@pytest.mark.parametrize("name", ["hf", "tensorrt"])
def test_another_rank_of_a_backend_of_one_process_is_told_so(name, tmp_path):
    with pytest.raises(UsageError) as refused:
        backends.opener(name).run_worker(tmp_path, FLOAT)
    assert refused.value.hint
