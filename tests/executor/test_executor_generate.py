"""Generation against the source models' own forward pass, step by step."""

import math
import os
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from checkpoints_by_hand import (
    random_ids,
    reference_logits,
    relative_error,
    write_checkpoint,
    written,
)
from helpers.tiny_models import phi2, phi3, phi3_small
from transformers import DynamicCache

from phireg.errors import SourceError, UsageError
from phireg.executor import Sampling, generate, load, quantized, stream
from phireg.executor.attention import has_kernels
from phireg.executor.cuda import launch
from phireg.executor.decoder import Decoder, choose
from phireg.executor.finite import NO_TOKEN, NotFiniteError
from phireg.reader.tensors import EMBEDDING

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def source_of(model):
    return lambda ids: reference_logits(model, ids)


def greedy(logits_of, prompt, count):
    """Most likely continuation, with a whole forward pass per token."""
    ids = list(prompt)
    for _ in range(count):
        logits = logits_of(torch.tensor([ids]))[0, -1]
        best, second = logits.topk(2).values
        assert best - second > 1e-4, "too close to call: choose another seed"
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


CASES = {
    "phi2": (phi2, {}, 2),
    "phi3-gqa": (phi3, {"num_key_value_heads": 2}, 4),
    "phi3-long": (phi3, {"long": 32}, 1),
    "small": (phi3_small, {}, 1),
    "small-tp8": (phi3_small, {"dense_attention_every_n_layers": 3}, 8),
    "small-long": (phi3_small, {"long": 32}, 2
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    make, changes, ranks = CASES[request.param]
    model = make(**changes)
    directory = tmp_path_factory.mktemp(request.param)
    return model, load(write_checkpoint(model, directory, ranks))


# Texts on either side of long rope's switch at 32 tokens, and on both in one batch. None passes it:
# cached keys then keep the short factors, which no whole forward pass does.
PROMPTS = ([33, 58, 41], [3, 20, 9], [20, 58, 4, 33])


@pytest.mark.parametrize("lengths", PROMPTS, ids=str)
def test_rows_of_a_padded_batch_continue_as_the_source_model_does(case, lengths):
    model, executor = case
    prompts = [random_ids(model, n, seed=n + 1).tolist() for n in lengths]
    expected = [greedy(source_of(model), prompt, 9) for prompt in prompts]
    assert generate(executor, prompts, 9) == expected
    assert [generate(executor, [prompt], 9)[0] for prompt in prompts] == expected


def fused_tokens(executor, prompts, steps):
    """Greedy tokens by the kernels of a GPU, which Triton's interpreter runs here."""
    decoder = Decoder(executor, len(prompts), 64, Sampling(), fused=True)
    decoder.prefill(prompts, seed=0)
    tokens = [decoder.token.tolist()]
    for _ in range(steps - 1):
        decoder.step()
        tokens.append(decoder.token.tolist())
    return [list(row) for row in zip(*tokens, strict=True)]


SMALLER = {"vocab_size": 31, "num_hidden_layers": 2}


def load_written(model, directory, ranks, scheme, kv):
    """An executor, and whose forward pass counts: its own, which has tests, if it is quantized."""
    if scheme is None:
        executor = load(write_checkpoint(model, directory, ranks), device=DEVICE)
        return executor, source_of(model)
    written(model, directory, random_ids(model, 30), scheme, kv, ranks)
    executor = load(directory, device=DEVICE)
    return executor, executor


@pytest.mark.parametrize(
    ("make", "changes", "ranks", "lengths", "scheme", "kv"),
    [
        (phi2, {}, 2, (13, 9), None, None),
        # a row of long rope's long factors beside one of the short ones
        (phi3, {"long": 32, "num_key_value_heads": 2}, 1, (35, 20), None, None),
        (phi3, {"num_hidden_layers": 1}, 2, (7, 12), "fp8", "fp8"),
        # past the mask's threshold of 8 tokens
        (phi3_small, {}, 2, (13, 9), "int8_sq", "int8"),
        (phi3, {"num_hidden_layers": 1}, 1, (7, 12), "int4_wo", None),
    ],
)
def test_the_kernels_of_a_gpu_continue_as_a_forward_pass_does(
    make, changes, ranks, lengths, scheme, kv, tmp_path, monkeypatch
):
    """Weights and caches stay as stored; the forward pass is that of their values."""
    model = make(**SMALLER | changes)
    executor, logits_of = load_written(model, tmp_path, ranks, scheme, kv)
    if scheme is not None:
        monkeypatch.setattr(quantized, "keeps_levels", lambda device, grid: True)
        executor = load(tmp_path, device=DEVICE)
    prompts = [random_ids(model, n, seed=n).tolist() for n in lengths]
    expected = [greedy(logits_of, prompt, 3) for prompt in prompts]
    assert fused_tokens(executor, prompts, 3) == expected
    if scheme is None:
        assert fused_tokens(executor, prompts[1:], 2) == [expected[1][:2]]


@pytest.mark.parametrize("linear", ["attention.qkv", "mlp.fc"])
@pytest.mark.parametrize("rows", [1, 2])
def test_what_int8_has_no_level_for_is_reported(linear, rows, tmp_path, monkeypatch):
    """A key, whose attention becomes int8, or a number in the MLP."""
    model = phi3(**SMALLER | {"num_hidden_layers": 1})
    written(model, tmp_path, random_ids(model, 30), "int8_sq", "int8", 1)
    monkeypatch.setattr(quantized, "keeps_levels", lambda device, grid: True)
    executor = load(tmp_path, device=DEVICE)
    # torch's attention on a CPU loses NaN of fewer tokens than a vector has numbers.
    prompts = [random_ids(model, 20 + n, seed=n).tolist() for n in range(rows)]
    decoder = Decoder(executor, rows, 32, Sampling(), fused=True)
    decoder.prefill(prompts, seed=0)
    assert (decoder.token >= 0).all()
    row = executor.spec.rank_heads * executor.spec.head_size  # of the first key, and some other
    executor.layer_weights(0)[0][f"{linear}.weights_scaling_factor"][row] = math.nan
    decoder.step()
    assert (decoder.token == NO_TOKEN).all()
    decoder.prefill(prompts, seed=0)
    assert (decoder.token == NO_TOKEN).all()


GPU_SIZE = {"hidden_size": 128}  # sizes that FP8 products take


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("make", "changes", "ranks", "scheme", "kv"),
    [
        (phi3, {"num_key_value_heads": 2}, 4, None, None),
        (phi3_small, {}, 1, None, None),
        (phi3, {"num_hidden_layers": 2}, 2, "fp8", "fp8"),
        (phi3_small, {"num_hidden_layers": 2}, 2, "int8_sq", "int8"),
    ],
)
def test_on_a_gpu(make, changes, ranks, scheme, kv, tmp_path):
    model = make(**changes, **GPU_SIZE)
    executor, logits_of = load_written(model, tmp_path, ranks, scheme, kv)
    prompts = [random_ids(model, n, seed=n).tolist() for n in (70, 41)]
    expected = [greedy(logits_of, prompt, 5) for prompt in prompts]
    assert generate(executor, prompts, 5) == expected
    assert generate(executor, prompts, 5) == expected  # the captured step again
    logits = executor(torch.tensor(prompts[1:])).cpu()
    assert relative_error(logits, load(tmp_path)(torch.tensor(prompts[1:]))) < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp8_weights_as_they_are_on_a_gpu(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8")
    model = phi3(num_hidden_layers=2, **GPU_SIZE)
    written(model, tmp_path, random_ids(model, 30), "fp8", "fp8", dtype=torch.bfloat16)
    executor = load(tmp_path, device="cuda")
    kept = executor.layer_weights(0)[0]
    assert kept["mlp.fc.e4m3"].dtype == kept["mlp.proj.e4m3"].dtype == torch.float8_e4m3fn
    for rows in (1, 2, 5):
        ids = random_ids(model, rows, 17)
        assert relative_error(executor(ids).cpu(), load(tmp_path)(ids)) < 0.2
        prompts = ids.tolist()
        new = generate(executor, prompts, 3)
        for prompt, tokens in zip(prompts, new, strict=True):
            logits = executor(torch.tensor([prompt + tokens[:-1]]))[0, -3:]
            best = logits.max(-1).values
            chosen = logits[torch.arange(3), torch.tensor(tokens)]
            assert (best - chosen).max() < 0.2 * logits.std()  # the best one, or almost


def test_cached_keys_stay_as_they_are_when_long_rope_switches(tmp_path):
    """As in the reference when its cache is kept, unlike a forward pass over all tokens."""
    model = phi3_small(long=32)
    executor = load(write_checkpoint(model, tmp_path))
    prompt = random_ids(model, 28, seed=3)
    cache, ids, expected = DynamicCache(), prompt[None], []
    with torch.no_grad():
        for _ in range(12):
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)[None]
            expected.append(int(ids))
    assert generate(executor, [prompt.tolist()], 12) == [expected]
    assert greedy(source_of(model), prompt.tolist(), 12) != expected


@pytest.fixture(scope="module")
def phi2_executor(tmp_path_factory):
    return load(write_checkpoint(phi2(), tmp_path_factory.mktemp("phi2")))


def test_rows_end_with_a_stop_id(phi2_executor):
    prompts = [[5, 6, 7], [90, 12]]
    free = generate(phi2_executor, prompts, 8)
    stop = free[0][3]
    assert stop not in free[0][:3]
    assert stop not in free[1]
    assert generate(phi2_executor, prompts, 8, stop_ids=[stop]) == [free[0][:4], free[1]]
    steps = list(stream(phi2_executor, prompts, 8, stop_ids=[stop]))
    assert [row for row, _ in steps] == [*free[0][:4], None, None, None, None]
    # all rows ended: no further step
    assert len(list(stream(phi2_executor, prompts[:1], 8, stop_ids=[stop]))) == 4


def test_streams_do_not_share_a_cache(phi2_executor):
    first, second = [[5, 6, 7]], [[90, 12, 3]]
    expected = [generate(phi2_executor, prompt, 6)[0] for prompt in (first, second)]
    pairs = zip(stream(phi2_executor, first, 6), stream(phi2_executor, second, 6), strict=True)
    assert [list(row) for row in zip(*((a[0], b[0]) for a, b in pairs), strict=True)] == expected


def test_a_decoder_is_kept_for_the_next_call_of_its_shape(phi2_executor):
    expected = generate(phi2_executor, [[5, 6, 7]], 6)
    kept = phi2_executor.decoder
    generate(phi2_executor, [[90, 12]], 7)
    assert phi2_executor.decoder is kept
    assert generate(phi2_executor, [[5, 6, 7]], 6) == expected
    assert phi2_executor.decoder is kept
    generate(phi2_executor, [[90, 12], [4]], 7)
    assert phi2_executor.decoder is not kept


def test_a_released_model_holds_no_captured_step(phi2_executor):
    """Also while the decoder is referred to: NCCL would wait for it without end."""
    expected = generate(phi2_executor, [[5, 6, 7]], 6)
    kept = phi2_executor.decoder
    graph = kept._graph = Mock()
    phi2_executor.release()
    graph.reset.assert_called_once_with()
    assert phi2_executor.decoder is None
    assert kept._graph is None
    phi2_executor.release()  # nothing left to do
    assert generate(phi2_executor, [[5, 6, 7]], 6) == expected


class OtherError(Exception):
    """As Triton's own are, which have no base in common with Python's."""


@pytest.mark.parametrize("kind", [RuntimeError, OtherError])
def test_a_gpu_without_a_compiler_says_so_and_goes_on(kind, monkeypatch):
    def fail(*arguments):
        raise kind("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(launch, "activate", fail)
    # there is no GPU to look at
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    has_kernels.cache_clear()
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert not has_kernels(torch.device("cuda"))
    assert not has_kernels(torch.device("cuda"))  # once is enough
    has_kernels.cache_clear()
    assert not has_kernels(torch.device("cpu"))


def test_an_old_gpu_goes_without_kernels(monkeypatch):
    """One of compute capability 7.5, for which Triton builds some of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    has_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"compute capability 8\.0"):
        assert not has_kernels(torch.device("cuda"))
    has_kernels.cache_clear()


@pytest.mark.parametrize(
    ("prompts", "count"),
    [([], 1), ([[1], []], 1), ([[1]], 0), ([[1, 101]], 1), ([[-1]], 1), ([[1] * 100], 29)],
)
def test_requests_that_make_no_sense(phi2_executor, prompts, count):
    with pytest.raises(UsageError):
        generate(phi2_executor, prompts, count)


def test_sampling_repeats_with_its_seed(phi2_executor):
    def sampled(seed):
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        return generate(phi2_executor, [[5, 6, 7], [9]], 12, sampling=sampling)

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)
    one_choice = Sampling(temperature=2.0, top_k=1, seed=5)
    greedy_tokens = generate(phi2_executor, [[5, 6, 7]], 12)
    assert generate(phi2_executor, [[5, 6, 7]], 12, sampling=one_choice) == greedy_tokens


PROBABILITIES = (0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), (0.4, 0.3, 0.2, 0.1)),
        (Sampling(temperature=0.5), (16 / 30, 9 / 30, 4 / 30, 1 / 30)),
        (Sampling(temperature=1.0, top_k=2), (4 / 7, 3 / 7, 0, 0)),
        (Sampling(temperature=1.0, top_p=0.5), (4 / 7, 3 / 7, 0, 0)),
        (Sampling(temperature=1.0, top_p=0.35), (1, 0, 0, 0)),
        # top_k first: of the three that are left, two hold 0.75 of the probability
        (Sampling(temperature=1.0, top_k=3, top_p=0.75), (4 / 7, 3 / 7, 0, 0)),
        (Sampling(), (1, 0, 0, 0)),
    ],
)
def test_tokens_are_drawn_with_their_probability(sampling, expected):
    count = 20_000
    logits = torch.tensor(PROBABILITIES).log()[[2, 0, 3, 1]].expand(count, 4)
    noise = torch.empty(count, 4).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = torch.bincount(choose(logits, sampling, noise), minlength=4)[[1, 3, 0, 2]] / count
    for share, probability in zip(drawn.tolist(), expected, strict=True):
        error = math.sqrt(probability * (1 - probability) / count)
        assert abs(share - probability) <= 5 * error


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-37, 1e-6])
def test_a_temperature_next_to_nothing_draws_the_best(temperature):
    logits = torch.tensor([[-1e3, 4.0, 3.999, 80.0], [0.5, 2.0, -torch.inf, 1.999]])
    noise = torch.empty(2, 4).exponential_(generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(temperature), Sampling(temperature, top_k=3, top_p=0.9)):
        assert choose(logits, sampling, noise).tolist() == [3, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.5, 2, 0.9)], ids=str)
def test_no_token_is_chosen_among_numbers_that_are_none(sampling, bad):
    logits = torch.zeros(4, 5)
    logits[1, 3], logits[2] = bad, -math.inf
    logits[3, 2:] = -math.inf  # suppressed tokens are no defect
    tokens = choose(logits, sampling, torch.ones(4, 5)).tolist()
    assert [token < 0 for token in tokens] == [False, True, True, False]
    assert tokens[3] < 2


def test_a_row_that_overflows_is_named_and_others_go_on_until_then(tmp_path):
    """The second row's second token has an embedding of NaN; a row that has ended may have it."""
    model = phi3()
    executor = load(write_checkpoint(model, tmp_path), device=DEVICE)
    prompts = [random_ids(model, n, seed=n).tolist() for n in (9, 6)]
    expected = [greedy(source_of(model), prompt, 4) for prompt in prompts]
    poison = expected[1][1]
    assert poison not in (*expected[0], expected[1][0], *prompts[0], *prompts[1])
    executor.end_weights()[0][EMBEDDING][poison] = math.nan
    steps = []
    with pytest.raises(NotFiniteError) as caught:
        steps.extend(stream(executor, prompts, 4))
    assert steps == [list(step) for step in zip(*(row[:2] for row in expected), strict=True)]
    assert (caught.value.row, caught.value.position, caught.value.dtype) == (1, 8, "float32")
    assert caught.value.exit_code == 4
    assert generate(executor, prompts, 4, stop_ids=[poison]) == [expected[0], expected[1][:2]]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0}]
)
def test_sampling_out_of_range(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)


@pytest.mark.parametrize("offload", [False, True])
def test_a_file_that_becomes_shorter_is_an_error_and_no_bus_error(offload, tmp_path):
    directory = write_checkpoint(phi2(), tmp_path, 1)
    model = load(directory, dtype="float32", offload=offload)
    steps = stream(model, [[5, 6, 7]], 20)
    next(steps)
    os.truncate(directory / "rank0.safetensors", 4096)
    with pytest.raises(SourceError, match=r"rank0\.safetensors"):
        list(steps)
