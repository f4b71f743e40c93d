"""Prompt ids of the model's own recipe: what transformers 4 and the libraries make of a text.

The ids of tokenizer.json's files were recorded with AutoTokenizer of transformers 4.45.2 and
4.57.6, which agree.
"""

import importlib.util
import json
import random
import warnings

import pytest
from helpers.phi3_tokenizers import BOS, NONE, write_sentencepiece, write_tokenizer
from helpers.tokenized_models import CORPUS, chat_tokenizer

from phireg import demo
from phireg.errors import PhiregWarning, SourceError, UsageError
from phireg.generation import tokenizer as tokenizer_module
from phireg.generation.tokenizer import Tokenizer, find_tokenizer

APRIL = {"add_bos_token": True, "add_eos_token": False}
JULY = {"add_bos_token": False, "add_eos_token": False}


@pytest.mark.parametrize(
    ("post_processor", "config", "ids", "disagree"),
    [
        (NONE, APRIL, [1, 271, 276], True),
        (NONE, JULY, [271, 276], False),
        (NONE, {}, [1, 271, 276], True),
        (BOS, {}, [1, 271, 276], False),
        (BOS, {"add_bos_token": False}, [271, 276], True),
        (NONE, {"add_bos_token": False, "add_eos_token": True}, [271, 276, 277], True),
        (NONE, {"tokenizer_class": None, "add_bos_token": True}, [1, 271, 276], True),
        (
            NONE,
            {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
            [271, 276],
            0,
        ),
        (BOS, {"tokenizer_class": "PreTrainedTokenizerFast", **JULY}, [1, 271, 276], False),
        (NONE, {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, [271, 276], False),
    ],
    ids=str,
)
def test_special_tokens_are_those_of_transformers_4(
    post_processor, config, ids, disagree, tmp_path
):
    write_tokenizer(tmp_path, post_processor, **config)
    (tmp_path / "config.json").write_text('{"architecture": "Phi3ForCausalLM"}')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer = find_tokenizer(tmp_path)
    assert tokenizer.encode("Hello world") == ids
    assert tokenizer.encode("Hello world", chat=True) == [271, 276]
    assert [w.category for w in caught] == [PhiregWarning] * disagree
    if disagree:
        assert "add_bos_token" in str(caught[0].message)


@pytest.mark.parametrize(
    "config", [{"add_bos_token": "yes"}, {"add_eos_token": True, "eos_token": None}], ids=str
)
def test_a_recipe_that_makes_no_sense(config, tmp_path):
    write_tokenizer(tmp_path, **config)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"</s>": 2', '"</t>": 2'))
    (key,) = [key for key in config if key.startswith("add")]
    with pytest.raises(SourceError, match=key):
        find_tokenizer(tmp_path)


def test_a_sentencepiece_model_alone_is_read_as_sentencepiece_does(tmp_path):
    own = write_sentencepiece(tmp_path)
    tokenizer = find_tokenizer(tmp_path)
    for text in ("the quick brown fox", "naïve  日本 dogs"):
        assert tokenizer.encode(text) == [1, *own.encode(text)]
    end = own.get_piece_size() + 3
    assert tokenizer.encode("fox<|end|>") == [1, *own.encode("fox"), end]


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    found, module = importlib.util.find_spec, package.replace("protobuf", "google.protobuf")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else found(name)
    )
    with pytest.raises(SourceError, match=package) as caught:
        find_tokenizer(tmp_path)
    assert "pip install" in caught.value.hint


def texts():
    random.seed(0)
    words = CORPUS.split()
    yield " ".join(random.choice(words) for _ in range(3000))
    yield "".join(random.choice(" \n\t aZé日😀1.,'") for _ in range(12000))
    yield "日本語の文字" * 2000


@pytest.mark.parametrize("keep", ["start", "end"])
@pytest.mark.parametrize("family", ["bpe", "phi3-mini", "phi3-small"])
def test_part_of_a_long_text_is_encoded_as_in_the_whole(family, keep):
    if family == "bpe":
        tokenizer = Tokenizer(chat_tokenizer())
    else:
        tokenizer = find_tokenizer(demo.find(family).directory)
    encoded = []
    inner = tokenizer._inner
    for text in texts():
        whole = tokenizer.encode(text)
        part = tokenizer.encode(text, 100, keep=keep)
        assert part == (whole[:100] if keep == "start" else whole[-100:])
    tokenizer._inner = lambda text, **options: encoded.append(len(text)) or inner(text, **options)
    tokenizer._inner.truncation_side = None
    tokenizer.encode("a few words more " * 100_000, 100, keep=keep)
    assert max(encoded) < 50_000


@pytest.mark.parametrize("text", ["\ud800", "a \udc80 b"])
def test_half_of_a_surrogate_pair_is_refused(text):
    tokenizer = Tokenizer(chat_tokenizer())
    for encode in (
        tokenizer.encode,
        lambda t: tokenizer.chat_ids([{"role": "user", "content": t}]),
    ):
        with pytest.raises(UsageError):
            encode(text)


@pytest.mark.parametrize(
    "template",
    [
        {"rag": "{{ messages }}", "tools": "x"},
        "{{ raise_exception('no') }}",
        "{{ messages[7].role.x }}",
        "{{ 1 / 0 }}",
        "{% for",
        "{{ [] + 1 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a' * 3 * 10 ** 7 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        f"{{{{ {'(' * 10**5} }}}}",
        None,
    ],
    ids=lambda template: str(template)[:60],
)
def test_a_template_that_cannot_be_used_is_one_error(template, tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizer_module._TEMPLATE_LIMITS, "seconds", 2)
    monkeypatch.setitem(tokenizer_module._TEMPLATE_LIMITS, "memory", 2**28)
    chat_tokenizer(template=None).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = template
    if isinstance(template, dict):
        named = [{"name": name, "template": text} for name, text in template.items()]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    with pytest.raises(UsageError, match="chat template"):
        find_tokenizer(tmp_path).chat_ids([{"role": "user", "content": "hi"}])
