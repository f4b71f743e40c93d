"""``phireg verify --endpoint``, against stub servers of transformers' models, sound and faulty."""

import json
import socket
import threading
import time
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
from helpers.command_line import run_phireg
from helpers.tiny_models import opened, phi3, phi3_small, randomize
from safetensors.torch import load_file
from stub_server import Stub, serving
from transformers import AutoModelForCausalLM, DynamicCache

import phireg
from phireg.calibration.collect import collect
from phireg.errors import PhiregError, SourceError
from phireg.verification import server
from phireg.verification.server import Server

ORIGINAL = 52


def long_rope():
    return randomize(phi3(long=ORIGINAL), 2.5, seed=5)


def sparse():
    return randomize(phi3_small(long=ORIGINAL), 4.0, seed=5)


def sliding():
    return randomize(phi3(sliding_window=24), 2.5, seed=5)


def plain(model):
    """The model itself."""

    def logits(ids, lengths):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    return logits


def forced(model, kind):
    """Long rope's factors of one side for all: those tables are put in the other's place."""
    config = model.config
    block = dict(config.rope_parameters)
    other = "short" if kind == "long" else "long"
    block[f"{other}_factor"] = block[f"{kind}_factor"]
    config.rope_parameters = block
    twin = type(model)(config)
    twin.load_state_dict(model.state_dict())
    return plain(twin.eval())


def batch_wide(model):
    """All rows of a batch take the long factors if one of them is past the switch."""
    own, long = plain(model), forced(long_rope(), "long")

    def logits(ids, lengths):
        return (long if max(lengths) > ORIGINAL else own)(ids, lengths)

    return logits


def dense(model):
    model.config.dense_attention_every_n_layers = 1
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return plain(twin.eval())


def windowless(model):
    model.config.sliding_window = None
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return plain(twin.eval())


def source(make, directory):
    make().save_pretrained(directory)
    return directory


def verified(stub, directory, **options):
    with serving(stub) as url:
        return phireg.verify_endpoint(url, directory, form="float32", device="cpu", **options)


def verdicts(verification):
    made = {check.name: check.verdict for check in verification.checks}
    return {name: verdict for name, verdict in made.items() if verdict not in ("not needed",)}


@pytest.mark.parametrize(
    ("make", "scoring"),
    ((long_rope, "echo"), (sparse, "prompt_logprobs"), (sliding, "echo")),
)
def test_a_sound_server(make, scoring, tmp_path):
    verification = verified(Stub(plain(make()), scoring=scoring), source(make, tmp_path))
    failed = {name for name, verdict in verdicts(verification).items() if verdict == "failed"}
    assert not failed, verification.checks
    expected = {long_rope: "long rope", sparse: "block-sparse", sliding: "sliding window"}[make]
    assert verdicts(verification)[expected] == "passed"
    assert verdicts(verification)["generation"] == "passed"


@pytest.mark.parametrize(
    ("make", "fault", "check", "words"),
    (
        (long_rope, lambda m: forced(m, "long"), "long rope", "long factors for every request"),
        (long_rope, lambda m: forced(m, "short"), "long rope", "short factors for every request"),
        (long_rope, batch_wide, "neighbors", "whole batch"),
        (sparse, dense, "block-sparse", "attend to all tokens"),
        (sliding, windowless, "sliding window", "sliding window is ignored"),
    ),
)
def test_a_server_with_a_fault(make, fault, check, words, tmp_path):
    verification = verified(Stub(fault(make())), source(make, tmp_path))
    assert verification.verdict == "failed"
    assert verdicts(verification)[check] == "failed"
    assert any(words in problem.text for problem in verification.check(check).problems)


def test_another_model(tmp_path):
    other = randomize(phi3(long=ORIGINAL), 2.5, seed=6)
    verification = verified(Stub(plain(other)), source(long_rope, tmp_path))
    assert verdicts(verification)["prompts"] == "failed"
    assert verdicts(verification)["generation"] == "failed"


def test_a_server_without_scores_of_prompts_is_not_verified(tmp_path):
    verification = verified(Stub(plain(long_rope()), scoring=None), source(long_rope, tmp_path))
    assert verification.verdict == "incomplete"
    assert verdicts(verification)["prompts"] == "skipped"


def test_a_checkpoint_says_the_same_as_its_source(tmp_path):
    plan = phireg.plan(source(sparse, tmp_path / "source"), family="phi3-small", dtype="float32")
    phireg.convert(plan, tmp_path / "checkpoint")
    sound = verified(Stub(plain(sparse())), tmp_path / "checkpoint")
    assert verdicts(sound)["block-sparse"] == verdicts(sound)["long rope"] == "passed"
    faulty = verified(Stub(dense(sparse())), tmp_path / "checkpoint")
    assert any("attend to all" in p.text for p in faulty.check("block-sparse").problems)


def test_a_quantized_directory_is_its_own_model(tmp_path):
    """The server is transformers, which reads the directory with compressed-tensors."""
    pytest.importorskip("compressed_tensors")
    form = {"dtype": "float32", "target": "hf-compressed-tensors", "qformat": "fp8_dynamic"}
    directory = tmp_path / "fp8"
    phireg.quantize(phireg.plan(source(sliding, tmp_path / "source"), **form), directory)
    served = AutoModelForCausalLM.from_pretrained(directory)
    sound = verified(Stub(plain(served)), directory)
    for name in ("prompts", "sliding window", "generation"):
        assert verdicts(sound)[name] == "passed", sound.checks
    served.config.sliding_window = None
    faulty = verified(Stub(plain(served)), directory)
    assert any("window is ignored" in p.text for p in faulty.check("sliding window").problems)


def test_a_directorys_cache_whose_scales_are_dropped(tmp_path):
    """Values are past e4m3's largest number, so that a scale of 1 cuts them."""

    def large():
        model = sliding()
        for layer in model.model.layers:
            layer.self_attn.qkv_proj.weight.data[-values:] *= 4000
            layer.self_attn.o_proj.weight.data /= 4000
        return model

    def served(scales):
        def update(cache, keys, values, layer, *more, **options):
            def rounded(states, scale):
                return (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

            pair = (rounded(*each) for each in zip((keys, values), scales[layer], strict=True))
            return own(cache, *pair, layer, *more, **options)

        def logits(ids, lengths):
            with torch.no_grad(), patch.object(DynamicCache, "update", update):
                return model(torch.tensor([ids]), use_cache=True).logits[0]

        return Stub(logits)

    own = DynamicCache.update
    attention = sliding().model.layers[0].self_attn
    values = attention.config.num_key_value_heads * attention.head_dim
    model = large()
    form = {"target": "hf-modelopt", "qformat": "int8_wo", "kv_cache_dtype": "fp8"}
    plan = phireg.plan(source(large, tmp_path / "source"), dtype="float32", **form)
    rows = [torch.randint(1, 100, (60,)).tolist() for _ in range(4)]
    reference = opened("phi3-gqa", tmp_path / "source")
    phireg.quantize(plan, tmp_path / "int8", collect(reference, rows, device=torch.device("cpu")))
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in stored:
            levels = stored[f"{name}.weight"].float()
            module.weight.data = levels * stored[f"{name}.weight_scale"][:, None]
    prefix = "model.layers.{}.self_attn.{}_proj.{}_scale"
    scales = [[stored[prefix.format(n, x, x)] for x in "kv"] for n in range(3)]
    sound = verified(served(scales), tmp_path / "int8").check("generation")
    assert sound.verdict == "passed", sound
    dropped = verified(served([(1.0, 1.0)] * 3), tmp_path / "int8").check("generation")
    assert any("scales of the quantized KV cache" in p.text for p in dropped.problems)


def test_prompts_longer_than_allowed_are_not_asked(tmp_path):
    stub = Stub(plain(long_rope()))
    verification = verified(stub, source(long_rope, tmp_path), max_tokens=50)
    assert verdicts(verification)["long rope"] == "skipped"
    assert stub.requests < 10


@pytest.mark.parametrize(
    "answer",
    (b"", b"[]", b"{", b"[" * 100_000, b'{"choices": 1}', b'{"choices": [null]}',
     b'{"choices": [{"logprobs": {"token_logprobs": ["x"]}}]}',
     b'{"choices": [{"logprobs": {"token_logprobs": [null, ' + b"9" * 400 + b"]}}]}"),
)  # fmt: skip
def test_answers_that_are_none(answer, tmp_path):
    stub = Stub(plain(long_rope()))
    stub.complete = stub.chat = lambda body: answer
    try:
        verification = verified(stub, source(long_rope, tmp_path))
    except PhiregError as error:
        assert error.exit_code == 3
    else:
        assert verification.verdict == "incomplete"


@pytest.mark.parametrize(
    ("url", "code"),
    (
        ("http://[::1", 2), ("http://localhost:port", 2), ("http://localhost:99999", 2),
        ("http://local host/v1", 2), ("http://user:secret@127.0.0.1:9/v1", 2),
        (f"http://{'a' * 70}.b", 3),
    ),
)  # fmt: skip
def test_urls_of_no_server(url, code):
    with pytest.raises(PhiregError) as raised:
        Server(url)
    assert raised.value.exit_code == code
    assert "secret" not in str(raised.value)


def test_a_server_of_another_protocol():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(SourceError):
            Server(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_factors_that_change_nothing_leave_it_open(tmp_path):
    """Short and long factors that are nearly equal: no server can be told to mix them up."""

    def alike():
        model = long_rope()
        block = dict(model.config.rope_parameters)
        block["long_factor"] = [factor * 1.0001 for factor in block["short_factor"]]
        model.config.rope_parameters = block
        twin = type(model)(model.config)
        twin.load_state_dict(model.state_dict())
        return twin.eval()

    verification = verified(Stub(plain(alike())), source(alike, tmp_path))
    for name in ("long rope", "neighbors"):
        assert verdicts(verification)[name] == "incomplete"


def test_an_answer_without_an_end(monkeypatch):
    monkeypatch.setattr(server, "TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.05)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(SourceError, match="no end"):
            Server(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_more_tokens_than_were_asked_for(tmp_path):
    stub = Stub(plain(sliding()))
    continued = stub.continued

    def endless(prompt, lengths, body):
        return continued(prompt, lengths, body) | {
            "logprobs": {"token_logprobs": [-1.0] * 1_000_000}
        }

    stub.continued = endless
    verification = verified(stub, source(sliding, tmp_path))
    assert verdicts(verification)["generation"] == "failed"


def test_a_window_without_tokens_past_it_is_not_checked(tmp_path):
    def short():
        return randomize(phi3(sliding_window=63, max_position_embeddings=64), 2.5, seed=5)

    verification = verified(Stub(plain(short())), source(short, tmp_path))
    assert verdicts(verification)["sliding window"] == "skipped"
    assert verification.verdict == "incomplete"


def test_a_config_with_errors(tmp_path):
    source(sliding, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("vocab_size", "many"), ("max_position_embeddings", None)):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(PhiregError):
            verified(Stub(plain(sliding())), tmp_path)


def test_the_command(tmp_path):
    directory = source(sliding, tmp_path)
    with serving(Stub(windowless(sliding()))) as url:
        options = ("--endpoint", url, "--model-dir", directory, "--device", "cpu")
        page = tmp_path / "page.html"
        result = run_phireg("verify", *options, "--format", "float32", "--json", "--report", page)
        other = run_phireg("verify", *options, "--served-model", "gpt")
    assert result.exit_code == 4, result.output
    document = json.loads(result.stdout)
    (check,) = [check for check in document["checks"] if check["name"] == "sliding window"]
    assert check["verdict"] == "failed"
    html = page.read_text()
    assert url in html
    assert check["problems"][0]["text"] in html
    assert other.exit_code == 2
    assert run_phireg("verify", *options, "--quick").exit_code == 2
    model = ("--model-dir", directory, "--served-model", "gpt")
    assert run_phireg("verify", directory, *model).exit_code == 2
    assert run_phireg("verify", "--endpoint", url).exit_code == 2
    assert run_phireg("verify", *options).exit_code == 3
    assert run_phireg("verify", "--endpoint", "file:///etc", *options[2:]).exit_code == 2
