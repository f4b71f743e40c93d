"""`phireg run --chat` with scripted lines, against prompts written out by hand."""

import json
import signal

import pytest
from click.testing import CliRunner
from helpers.tokenized_models import chat_tokenizer, continuation

from phireg.cli import chat as chat_module
from phireg.executor import Sampling
from phireg.generation import Description, Options, Request
from phireg.generation.generate import Generator

END, EOS = 303, 300


def answer(it, text, count=8, eos=(END, 310, 311)):
    return continuation(it.model, it.tokenizer, text, count, list(eos))


def test_every_turn_is_the_templates_string(models, run):
    it = models("phi3")
    context = "<|system|>\nBe brief.<|end|>\n<|user|>\nWer liest?<|end|>\n<|assistant|>\n"
    _, first = answer(it, context)
    context += f"{first}<|end|>\n<|user|>\n  and why<|end|>\n<|assistant|>\n"
    _, second = answer(it, context)
    lines = b"Wer liest?\n\n  and why\n/exit\nnever read\n"
    result = run(
        it.checkpoint, "--chat", "--system", "Be brief.", "--max-new-tokens", 8, stdin=lines
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{first}\n{second}\n"
    assert first != second


def test_small_begins_with_its_first_token(models, run):
    it = models("phi3-small")
    context = "<|endoftext|><|user|>\nhi<|end|>\n<|assistant|>\n"
    _, expected = answer(it, context, eos=(it.tokenizer.convert_tokens_to_ids("<|end|>"),))
    # The line ends without a newline.
    result = run(it.checkpoint, "--chat", "--max-new-tokens", 8, stdin=b"hi")
    assert (result.exit_code, result.stdout) == (0, expected + "\n")


@pytest.fixture
def generator(tmp_path):
    """Of a model with 256 positions whose generation_config.json names no end of a turn."""
    (tmp_path / "config.json").write_text("{}")
    chat_tokenizer().save_pretrained(tmp_path)
    return Generator(
        "executor", tmp_path, Options(), Description(312, 256), sampling=Sampling(seed=5)
    )


def test_the_end_of_the_turn_stops_whatever_generation_config_says(generator):
    class Backend:
        processes = 1

        def stream(self, request):
            self.request = request
            for token in (71, 72, END, 73):
                yield [token]
                if token in request.stop_ids:
                    return

    backend, tokenizer = Backend(), generator.tokenizer
    chat = chat_module.Chat(generator, system=None)
    with CliRunner().isolation(input=b"one\ntwo\n"):
        chat.run(backend)
    text = tokenizer.decode([71, 72])
    roles = [(message["role"], message["content"]) for message in chat.messages]
    assert roles == [("user", "one"), ("assistant", text), ("user", "two"), ("assistant", text)]
    context = f"<|user|>\none<|end|>\n<|assistant|>\n{text}<|end|>\n<|user|>\ntwo<|end|>\n"
    ids = tokenizer.encode(context + "<|assistant|>\n")
    # room for all positions left, and a seed for each answer
    assert backend.request == Request([ids], 256 - len(ids), {EOS, END}, Sampling(seed=6))


def test_ctrl_c_stops_the_answer_and_not_the_chat(generator, monkeypatch):
    from phireg.cli.errors import stop

    monkeypatch.setattr("phireg.cli.errors._last_stop", float("-inf"))
    turns = []

    class Backend:
        processes = 1

        def stream(self, request):
            turns.append(request.prompts)
            for token in (71, 72, 73):
                if len(turns) == 1 and token == 72:
                    signal.raise_signal(signal.SIGINT)
                yield [token]

    tokenizer = generator.tokenizer
    chat = chat_module.Chat(generator, system=None)
    before = signal.signal(signal.SIGINT, stop)
    try:
        with CliRunner().isolation(input=b"one\ntwo\n") as (out, *_):
            chat.run(Backend())
            shown = out.getvalue().decode()
        assert signal.getsignal(signal.SIGINT) is stop
        with chat_module._interruptible(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    first, second = tokenizer.decode([71, 72]), tokenizer.decode([71, 72, 73])
    assert shown == f"{first}\n{second}\n"
    assert [m["content"] for m in chat.messages] == ["one", first, "two", second]


def test_lines_that_do_not_fit_or_are_no_text(models, run):
    lines = b"word " * 90 + b"\ncaf\xe9\nshort\n"
    result = run(models("phi3").checkpoint, "--chat", "--max-new-tokens", 4, stdin=lines)
    assert result.exit_code == 0
    assert "256 positions" in result.stderr
    assert "not UTF-8" in result.stderr
    context = "<|user|>\nshort<|end|>\n<|assistant|>\n"  # what did not fit is left out
    assert result.stdout == answer(models("phi3"), context, 4)[1] + "\n"


@pytest.mark.parametrize(
    ("template", "system", "names"),
    [
        (None, None, "--prompt"),
        ("{{ raise_exception('only users') }}", None, "only users"),
        ("{{ raise_exception('a\\x1b[2Jb\\x9bc') }}", None, "a\\x1b[2Jb\\x9bc"),
        ("{% for m in messages[-1:] %}{{ m.content }}{% endfor %}", "Brief.", "--system"),
        ("{% for m in", None, "chat template"),
    ],
)
def test_unusable_templates_are_refused(template, system, names, altered, run):
    path = altered / "tokenizer_config.json"
    (altered / "chat_template.jinja").unlink()
    config = json.loads(path.read_text()) | ({"chat_template": template} if template else {})
    path.write_text(json.dumps(config))
    flags = () if system is None else ("--system", system)
    result = run(altered, "--chat", *flags, stdin=b"hi\n")
    assert result.exit_code == 2
    assert names in " ".join(result.stderr.split())
    assert result.stderr.replace("\n", "").isprintable()
