"""Tiny source models with real tokenizers, and what transformers itself makes of a prompt."""

import base64
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import phireg
from helpers.tiny_models import phi2, phi3, phi3_small

CORPUS = (
    "The engine reads the checkpoint and the checkpoint holds the weights. "
    "Wer liest die Straße? Ça va naïvement, déjà vu. 日本語の文字と日本の言葉。 😀😀🎉 "
)
# The current revision of Phi-3-mini: each turn in its own line, then the assistant's.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


def trained(size=300):
    """A byte-level BPE of ``size`` tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS] * 3, trainer)
    return tokenizer


def chat_tokenizer(special=SPECIAL, template=CHAT_TEMPLATE):
    inner = trained()
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def write_ranks(path):
    """The same tokens as a tiktoken file: the bytes, then the merges, in order."""
    inner = trained()
    to_byte = {char: byte for byte, char in _byte_chars().items()}
    vocab = sorted(inner.get_vocab(), key=lambda token: (len(token) > 1, inner.token_to_id(token)))
    lines = [
        base64.b64encode(bytes(to_byte[char] for char in token)) + b" %d\n" % rank
        for rank, token in enumerate(vocab)
    ]
    path.write_bytes(b"".join(lines))
    return len(lines)


def _byte_chars():
    """GPT-2's printable stand-ins for bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def save(model, directory, tokenizer=None):
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def source_phi2(directory):
    tokenizer = chat_tokenizer(special=("<|endoftext|>",), template=None)
    model = phi2(vocab_size=320, layer_norm_eps=1e-5)
    save(model, directory, tokenizer)
    (directory / "generation_config.json").write_text('{"eos_token_id": 319}')
    return model, tokenizer


def source_phi3(directory):
    tokenizer = chat_tokenizer()
    model = phi3(vocab_size=len(tokenizer) + 7, num_key_value_heads=4)
    save(model, directory, tokenizer)
    (directory / "generation_config.json").write_text('{"eos_token_id": [311, 310]}')
    return model, tokenizer


def source_small(directory):
    from phireg_plugins.phi3_small.tokenizer import load_tokenizer

    directory.mkdir(parents=True)
    size = write_ranks(directory / "cl100k_base.tiktoken") + 96
    model = phi3_small(vocab_size=size)
    save(model, directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).unlink(missing_ok=True)
    return model, load_tokenizer(directory)


SOURCES = {"phi2": source_phi2, "phi3": source_phi3, "phi3-small": source_small}


def converted(source, directory, tp_size=1):
    phireg.convert(phireg.plan(source, dtype="float32", tp_size=tp_size), directory)
    return directory


def eos_ids(directory):
    path = Path(directory) / "generation_config.json"
    return json.loads(path.read_text())["eos_token_id"] if path.exists() else None


def continuation(model, tokenizer, prompt, count, eos=None):
    """New token ids and their text by transformers' own generate, greedy, one prompt alone."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if isinstance(prompt, str) else prompt
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=tokenizer.eos_token_id,
        )
    new = out[0, ids.shape[1] :].tolist()
    return new, tokenizer.decode(new, skip_special_tokens=True)
