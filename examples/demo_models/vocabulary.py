"""Byte-level BPE tokenizers of the demo models, trained on their articles."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from families import VOCAB_SIZE
from phireg_plugins.phi3_small.tokenizer import RANKS_FILE, SPECIAL_TOKENS, load_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_OF_TEXT = "<|endoftext|>"
# Ids from 0 on, and in Phi-4 the last ones. Phi-3's begin token is in the vocabulary and, as
# published, not put before a text.
SPECIALS = {
    "phi2": (END_OF_TEXT,),
    "phi3-mini": (END_OF_TEXT, "<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
SPECIALS["phi3-medium"] = SPECIALS["phi3.5-moe"] = SPECIALS["phi3-mini"]
SPECIALS["phi4"] = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|im_sep|>")
SPECIALS["phi4-mini"] = (END_OF_TEXT, "<|assistant|>", "<|end|>", "<|user|>", "<|system|>")
# Words with the space before them, punctuation, single digits, other spaces.
_WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def write_tokenizer(directory: Path, family: str, texts: Iterable[str]) -> None:
    """Train a tokenizer and write its files, for Phi-3-small in its published form of ranks."""
    if family == "phi3-small":
        ranks = _train(texts, VOCAB_SIZE - len(SPECIAL_TOKENS), ()).get_vocab()
        to_byte = {text: byte for byte, text in bytes_to_unicode().items()}
        lines = (
            base64.b64encode(bytes(to_byte[char] for char in token)) + b" %d\n" % rank
            for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        )
        (directory / RANKS_FILE).write_bytes(b"".join(lines))
        return
    specials = SPECIALS[family]
    last = specials if family.startswith("phi4") else ()
    first = () if last else specials
    tokenizer = _train(texts, VOCAB_SIZE - len(last), first)
    tokenizer.add_special_tokens([_special(token) for token in last])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer" if last else "PreTrainedTokenizerFast",
        "bos_token": "<s>" if "<s>" in specials else END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def open_tokenizer(directory: Path, family: str) -> Any:
    """The tokenizer as a user gets it, from the directory alone."""
    if family == "phi3-small":
        return load_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


def _special(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)


def _train(texts: Iterable[str], size: int, specials: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[_special(token) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens of {size}")
    return tokenizer
