"""The tokenizer, against merges done by hand and against the tiktoken package."""

import base64
import itertools
import json
import random

import pytest
from phireg_plugins.phi3_small import reference
from phireg_plugins.phi3_small.tokenizer import SPECIAL_TOKENS, load_tokenizer

from phireg.errors import SourceError

# The published table: ids after the 100256 ranks of the published file.
PUBLISHED_IDS = {
    "<|dummy_id_2|>": 100256,
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|system|>": 100261,
    "<|user|>": 100262,
    "<|assistant|>": 100263,
    "<|dummy_id_0|>": 100264,
    "<|dummy_id_1|>": 100265,
    "<|end|>": 100266,
    "<|dummy_id_3|>": 100267,
    "<|dummy_id_11|>": 100275,
    "<|endofprompt|>": 100276,
    "<|dummy_id_12|>": 100277,
    "<|dummy_id_86|>": 100351,
}
BYTES = [bytes([i]) for i in range(256)]
# Ids 256 ...; "abab" cannot be reached by merging "aba" but "ab" + "ab" makes it.
TINY = [*BYTES, b"ab", b"bc", b"abc", b" a", b"\n ", b"ca", b"abab", b"\xc3\xa9", b"\r\n", b"zyx"]


def write(directory, tokens, name="cl100k_base.tiktoken"):
    directory.mkdir(exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (directory / name).write_text("".join(lines))
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_tokenizer(write(tmp_path_factory.mktemp("tiny"), TINY))


def encode(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    return ids


AB, BC, ABC, SPACE_A, NEWLINE_SPACE, CA, ABAB, E_ACUTE, CRLF, ZYX = range(256, 266)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("abc", [ABC]),  # a whole word
        ("abcd", [ABC, 100]),  # ab, then ab + c
        ("bca", [BC, 97]),  # bc (257) before ca (261)
        ("dca", [100, CA]),
        ("aabab", [97, ABAB]),  # ab twice, then the pair
        ("ababab", [ABAB, AB]),
        ("zyx", [ZYX]),  # a word that no merge leads to
        ("zyxz", [122, 121, 120, 122]),
        (" ab", [32, AB]),  # ab (256) before the space and a (259)
        (" ac", [SPACE_A, 99]),
        ("a\n b", [97, 10, 32, 98]),  # a newline ends its word
        ("a\n ", [97, 10, 32]),  # ... at the end of the text too
        ("é", [E_ACUTE]),
        ("a1234", [97, 49, 50, 51, 52]),
        ("!\r\n", [33, CRLF]),
        ("\x00\t", [0, 9]),
    ],
)
def test_merges_by_hand(tiny, text, ids):
    assert encode(tiny, text) == ids


def test_special_tokens(tiny):
    offset = len(TINY) - 100256
    assert {token: tiny.convert_tokens_to_ids(token) - offset for token in PUBLISHED_IDS} == (
        PUBLISHED_IDS
    )
    assert len(tiny) == len(TINY) + 96
    assert len(set(SPECIAL_TOKENS)) == 96
    used = {"<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}
    unused = [tiny.convert_tokens_to_ids(t) - offset for t in SPECIAL_TOKENS if t not in used]
    assert reference.Phi3SmallConfig().masked_token_indices() == unused
    end, end_of_text = (PUBLISHED_IDS[t] + offset for t in ("<|end|>", "<|endoftext|>"))
    assert encode(tiny, "ab<|end|> a<|endoftext|>") == [AB, end, SPACE_A, end_of_text]
    assert tiny.decode([AB, end, SPACE_A], skip_special_tokens=True) == "ab a"
    assert tiny.bos_token_id == tiny.eos_token_id == tiny.pad_token_id == end_of_text


def test_padding_and_saving(tiny, tmp_path):
    batch, pad = tiny(["abc", "abcabcd"], padding=True), tiny.pad_token_id
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"] == [[pad, pad, ABC], [ABC, ABC, 100]]
    tiny.save_pretrained(tmp_path)
    again = type(tiny).from_pretrained(tmp_path)
    text = "ab é<|end|>\n a"
    assert again(text)["input_ids"] == tiny(text)["input_ids"]


def test_chat_template(tiny):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Why? "},
        {"role": "assistant", "content": "So."},
    ]
    text = (
        "<|endoftext|><|system|>\nBe brief.<|end|>\n<|user|>\n Why? <|end|>\n"
        "<|assistant|>\nSo.<|end|>\n"
    )
    render = tiny.apply_chat_template
    assert render(chat, tokenize=False) == text + "<|endoftext|>"
    assert render(chat, tokenize=False, add_generation_prompt=True) == text + "<|assistant|>\n"
    ids = render(chat[1:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == encode(tiny, "<|endoftext|><|user|>\n Why? <|end|>\n<|assistant|>\n")


def trained_tokens(text, count):
    """Ranks of a few hundred tokens: repeatedly the most frequent pair within a word."""
    words = [[bytes([b]) for b in word.encode()] for word in text.split("|")]
    tokens = list(BYTES)
    while len(tokens) < count:
        pairs = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if (token := b"".join(best)) not in tokens:
            tokens.append(token)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if i + 1 < len(word) and (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [token]
    return tokens


# fmt: off
PIECES = [
    "the", " the", "th", "anan", "banana", " ban", "aaaa", "abab", "baba", "é", "naïve", "\u017f",
    "'s", "'S", "'LL", "'ve", "'\u017f", "'", "\u2019s", "don't", "\u212a", "İ", "日本", "語", "Ω",
    "😀", "\u0301", "1", "23", "4567", "²", "½", "٣", "_", "-", "--", "...", "!?", "(x)", "#",
    "<|", "|>", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u3000", "\u0085",
    "\u2028", "\x1c", "\x0b", "\u200b", "\ufeff", "\x00", "\u180e",
]
# fmt: on
SPELLED = ["<|end|>", "<|user|>", "<|endoftext|>", "<|dummy_id_5|>"]
# cl100k's words in the releases of tiktoken that were out when Phi-3-small was published.
PUBLISHED_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)


def random_text(rng, pieces=PIECES):
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 30)))


@pytest.mark.parametrize("order", ["trained", "shuffled", "bytes last"])
def test_against_tiktoken(tmp_path, monkeypatch, order):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken_ext import openai_public

    rng = random.Random(order)
    tokens = trained_tokens("|".join(random_text(rng) for _ in range(60)), 500)
    if order != "trained":  # priorities that no training would give
        tokens = BYTES + rng.sample(tokens[256:], len(tokens) - 256)
    if order == "bytes last":
        tokens = tokens[256:] + BYTES
    tokenizer = load_tokenizer(write(tmp_path, tokens))

    def encoder(pattern):
        special = {token: len(tokens) + index for index, token in enumerate(SPECIAL_TOKENS)}
        ranks = {token: rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding(
            "published", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        return lambda text: encoding.encode(text, allowed_special="all")

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: None)
    published, installed = map(encoder, (PUBLISHED_PATTERN, openai_public.cl100k_base()["pat_str"]))
    merged = 0
    for _ in range(400):
        text = random_text(rng, PIECES + SPELLED)
        expected = published(text)
        assert encode(tokenizer, text) == expected, repr(text)
        merged += len(text.encode()) - len(expected)
        # Later releases differ where a text, or what precedes a special token, ends in space.
        text = random_text(rng) + "."
        assert encode(tokenizer, text) == installed(text), repr(text)
    assert merged > 400 * 10


MALFORMED = [None, b"", b"QQ== 0 1\n", b"QQ== 0\n\nQg== 1\n", b"Q!Q== 0\n", b"QQ== x\n"]
MALFORMED += [b"QQ== 0\nQQ== 1\n", b"QQ== 0\nQg== 2\n", b"\x80\x81\n"]


@pytest.mark.parametrize("content", MALFORMED)
def test_malformed_files(tmp_path, content):
    if content is not None:
        (tmp_path / "cl100k_base.tiktoken").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        load_tokenizer(tmp_path)
    assert "cl100k_base.tiktoken" in caught.value.message and caught.value.hint


def test_a_file_that_was_cut_off(tmp_path):
    write(tmp_path, TINY[:-1])
    config = {"model_type": "phi3small", "vocab_size": len(TINY) + 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"361.*362"):
        load_tokenizer(tmp_path)
    write(tmp_path, TINY)
    assert len(load_tokenizer(tmp_path)) == 362
    # Beside a converted model's config.json, which may pad the vocabulary, nothing is compared.
    (tmp_path / "config.json").write_text('{"architecture": "Phi3SmallForCausalLM"}')
    assert len(load_tokenizer(tmp_path)) == 362
