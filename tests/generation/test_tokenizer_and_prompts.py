"""Tokenizers, stop ids, prompts and pieces of text, each against values written here."""

import json
from types import SimpleNamespace

import pytest
from helpers.tokenized_models import chat_tokenizer, write_ranks
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from phireg.errors import PluginError, SourceError, UsageError
from phireg.generation.prompts import Prompt, encode_prompts, read_prompts
from phireg.generation.tokenizer import Tokenizer, find_tokenizer, stop_ids

TEXTS = ["héllo wörld", "日本語の文字😀🎉!", " a  b\n\tc", "naïve 🙈nicode é", "👩\u200d👩\u200d👧"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_the_text(text):
    tokenizer = Tokenizer(chat_tokenizer())
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids) or text.isascii()
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 3


def test_broken_characters_come_at_the_end_or_with_what_follows():
    tokenizer = Tokenizer(chat_tokenizer())
    half = tokenizer.encode("🙈")[:-1]
    text = b"\xf0\x9f\x99".decode(errors="replace")
    assert list(tokenizer.stream(half))[-1] == text
    assert "".join(tokenizer.stream([*half, *tokenizer.encode("ok")])) == text + "ok"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\ufffdb\ufffd", "a\ufffdb\ufffd"), ("one<|end|> two<|endoftext|>", "one two")],
)
def test_replacement_characters_stay_and_special_tokens_do_not(text, expected):
    tokenizer = Tokenizer(chat_tokenizer())
    assert "".join(tokenizer.stream(tokenizer.encode(text))) == expected


def sentencepiece_like():
    """A leading space is part of a token, and is lost at the start of a text; bytes as <0xE2>."""
    tokens = ["▁Hello", "▁world", "!", "▁", "<0xE2>", "<0x82>", "<0xAC>", "</s>"]
    inner = RustTokenizer(BPE({token: n for n, token in enumerate(tokens)}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))


def test_leading_spaces_and_byte_tokens():
    pieces = list(sentencepiece_like().stream([0, 1, 2, 3, 4, 5, 6, 1, 7]))
    assert pieces == ["Hello", " world", "!", " ", "€", " world", ""]
    assert list(sentencepiece_like().stream([7, 0, 7, 1])) == ["Hello", " world", ""]
    # A library's stream raises here: the first two bytes form no character, and another follows.
    broken = list(sentencepiece_like().stream([0, 4, 5, 1]))
    assert "".join(broken) == sentencepiece_like().decode([0, 4, 5, 1])


# Stop ids


@pytest.mark.parametrize(
    ("generation", "own", "config", "expected"),
    [
        ({"eos_token_id": 7}, 3, {}, {7}),
        ({"eos_token_id": [7, 9, 7]}, 3, {}, {7, 9}),
        ({"eos_token_id": None}, 3, {}, {3}),
        ({}, 3, {"eos_token_id": 5}, {3}),
        (None, 3, {"eos_token_id": 5}, {3}),
        (None, None, {"eos_token_id": 5}, {5}),
        (None, None, {}, set()),
    ],
)
def test_stop_ids(generation, own, config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = None if own is None else SimpleNamespace(eos_id=own)
    assert stop_ids(tmp_path, tokenizer) == expected


@pytest.mark.parametrize("value", ["7", [7, "9"], -1, 1.0, True, {}])
def test_stop_ids_that_are_none(value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(SourceError, match="eos_token_id"):
        stop_ids(tmp_path, None)


# Prompts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n  two \r\nthree", [("one", ()), ("  two ", ()), ("three", ())]),
        ("a.txt", "\ufeffé\u2028x\n", [("é\u2028x", ())]),
        ("a.txt", '{"other": 1}\n[1]', [('{"other": 1}', ()), ("[1]", ())]),
        ("a.jsonl", '{"prompt": "a\\nb"}\n{"input_ids": [3, 1]}', [("a\nb", ()), (None, (3, 1))]),
        ("-", '{"prompt": "", "id": 4}\n', [("", ())]),
    ],
)
def test_prompts(name, content, expected):
    prompts = read_prompts(name, content.encode())
    assert [(prompt.text, prompt.ids) for prompt in prompts] == expected


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a", b"x\ny\xff", 2),
        ("a.jsonl", b'{"prompt": "x"}\n\nplain', 3),
        ("a.jsonl", b"[1]", 1),
        ("a.jsonl", b'{"prompt": "x", "input_ids": [1]}', 1),
        ("a.jsonl", b'{"prompt": 1}', 1),
        ("a.jsonl", b'{"input_ids": []}', 1),
        ("a.jsonl", b'{"input_ids": [true]}', 1),
        ("a", b'{"input_ids": [1]}\nplain', 2),
    ],
)
def test_damaged_prompts_are_named(name, content, line):
    with pytest.raises(UsageError, match=f"^{name}:{line}: "):
        read_prompts(name, content)
    with pytest.raises(UsageError, match=r"^empty "):
        read_prompts("empty", b"\n \n")


def test_encoding_a_prompt():
    tokenizer, ids = Tokenizer(chat_tokenizer()), Prompt("here", "x", (5, 6))
    assert encode_prompts([ids], None, 9) == [ids]
    two = encode_prompts([Prompt("here", "a<|end|>"), ids], tokenizer, 99)
    assert (two[0].ids[-1], two[1]) == (303, ids)
    assert len(encode_prompts([Prompt("here", "many words " * 99)], tokenizer, 7)[0].ids) == 7
    for text in ("", "\ud800"):
        with pytest.raises(UsageError, match=r"^here: "):
            encode_prompts([ids, Prompt("here", text)], tokenizer, 99)
    with pytest.raises(UsageError, match="--tokenizer-dir"):
        encode_prompts([Prompt("here", "x")], None, 99)


# Tokenizers


def checkpoint(directory, architecture="Phi3SmallForCausalLM"):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"architecture": architecture}))
    return directory


def test_no_tokenizer_and_a_named_directory_without_one(tmp_path):
    ckpt = checkpoint(tmp_path / "ckpt")
    assert find_tokenizer(ckpt) is None
    for directory in (tmp_path, tmp_path / "no"):
        with pytest.raises(UsageError, match=str(directory)):
            find_tokenizer(ckpt, directory)


def test_the_named_directory_wins(tmp_path):
    ckpt, other = checkpoint(tmp_path / "ckpt"), tmp_path / "other"
    chat_tokenizer().save_pretrained(ckpt)
    chat_tokenizer(special=("<|endoftext|>",)).save_pretrained(other)
    assert find_tokenizer(ckpt).end_of_turn_ids == {303}
    assert find_tokenizer(ckpt, other).end_of_turn_ids == set()


def test_only_the_template_begins_a_chat():
    inner = chat_tokenizer()
    inner.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 300)]
    )
    tokenizer = Tokenizer(inner)
    text = "<|user|>\nhi<|end|>\n<|assistant|>\n"
    assert tokenizer.chat_text([{"role": "user", "content": "hi"}]) == text
    assert [300, *tokenizer.chat_ids([{"role": "user", "content": "hi"}])] == tokenizer.encode(text)


def test_code_beside_the_tokenizer_is_not_run(tmp_path):
    ckpt, trap = checkpoint(tmp_path / "ckpt"), tmp_path / "trapped"
    chat_tokenizer().save_pretrained(ckpt)
    for directory in (ckpt, tmp_path / "cut"):
        directory.mkdir(exist_ok=True)
        (directory / "tokenization_x.py").write_text(f"open({str(trap)!r}, 'w')")
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        config |= {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
        path.write_text(json.dumps(config | {"tokenizer_class": "X"}))
    (tmp_path / "cut" / "vocab.json").write_text("{}")
    assert find_tokenizer(ckpt).encode("a") == [64]
    with pytest.raises(SourceError):
        find_tokenizer(ckpt, tmp_path / "cut")
    assert not trap.exists()


def test_a_damaged_tokenizer(tmp_path):
    ckpt = checkpoint(tmp_path / "ckpt")
    for content in ("{", "{}", '{"model": {"type": "BPE", "vocab": 1}}'):
        (ckpt / "tokenizer.json").write_text(content)
        with pytest.raises(SourceError, match=str(ckpt)):
            find_tokenizer(ckpt)


def test_tiktoken_files_go_to_the_family_of_the_architecture(tmp_path):
    ckpt = checkpoint(tmp_path / "ckpt")
    size = write_ranks(ckpt / "cl100k_base.tiktoken")
    tokenizer = find_tokenizer(ckpt)
    # <|dummy_id_2|> and <|endoftext|> follow the ranks, <|end|> is the eleventh
    assert (tokenizer.eos_id, tokenizer.end_of_turn_ids) == (size + 1, {size + 10})
    other = checkpoint(tmp_path / "other", "PhiForCausalLM")
    with pytest.raises(PluginError, match="PhiForCausalLM"):
        find_tokenizer(other, ckpt)


def test_old_phi2_files_without_tokenizer_json(tmp_path):
    """vocab.json and merges.txt alone, as GPT-2 has them."""
    ckpt = checkpoint(tmp_path / "ckpt", "PhiForCausalLM")
    inner = chat_tokenizer(special=("<|endoftext|>",), template=None)
    inner.backend_tokenizer.model.save(str(ckpt))
    (ckpt / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", '
        '"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}'
    )
    text = "The engine reads naïve 日本語"
    tokenizer = find_tokenizer(ckpt)
    assert tokenizer.encode(text) == inner(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["rows.tsv", "table.XLSX", "paper.pdf", "prompts.txt.gz"])
def test_files_of_a_known_other_kind_are_no_prompts(name):
    with pytest.raises(UsageError, match="unknown kind"):
        read_prompts(name, b"a\tb\n")
