"""A tokenizer like Phi-4's: GPT-2's class, a pattern and special tokens of its own."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from phireg.errors import SourceError
from phireg.generation.tokenizer import find_tokenizer

# Digits in groups of three, as in Phi-4; GPT-2's pattern keeps a number whole.
PATTERN = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
TEXT = "In 1234567 lines"


@pytest.fixture
def directory(tmp_path):
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    # 345 and 3456 are common, so that only the pattern keeps them apart.
    inner.train_from_iterator(["345 lines and 123456 lines and 3456"] * 9, trainer)
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    inner.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": SPECIAL[0], "eos_token": SPECIAL[0],
        "add_prefix_space": False, "chat_template": TEMPLATE,
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Phi3ForCausalLM"]}))
    return tmp_path


@pytest.mark.parametrize("changes", [{}, {"tokenizer_class": None}])
def test_texts_are_split_as_tokenizer_json_says(directory, changes):
    """And begin with nothing, without a class's name too, where Phi-3's begin with <s>."""
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | changes
    kept = {key: value for key, value in settings.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    tokenizer, inner = find_tokenizer(directory), Tokenizer.from_file(f"{directory}/tokenizer.json")
    ids = tokenizer.encode(TEXT)
    assert ids == inner.encode(TEXT, add_special_tokens=False).ids
    assert [inner.decode([i]) for i in ids if inner.decode([i]).isdigit()] != ["1234567"]
    assert tokenizer.decode(ids) == TEXT


def test_a_chat(directory):
    """No token stands before the template's first, and the end of a turn is known."""
    tokenizer = find_tokenizer(directory)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|>"
    text += "<|im_start|>assistant<|im_sep|>"
    assert tokenizer.chat_text(messages) == text
    inner = Tokenizer.from_file(f"{directory}/tokenizer.json")
    ids = tokenizer.chat_ids(messages)
    assert ids == inner.encode(text, add_special_tokens=False).ids
    assert ids[0] == inner.token_to_id("<|im_start|>")
    assert tokenizer.end_of_turn_ids == {inner.token_to_id("<|im_end|>")}


def test_vocab_json_alone_is_refused(directory):
    """GPT-2's class would split numbers otherwise."""
    whole = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in whole["model"]["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    other = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    assert find_tokenizer(directory).encode(TEXT) != other
    (directory / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        find_tokenizer(directory)
