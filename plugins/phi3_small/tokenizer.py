"""Phi-3-small's tokenizer from its ``cl100k_base.tiktoken`` file: no network, no remote code.

The file has one token per line: its bytes in base64, a space, and its rank, which is both its id
and its merge priority. Special tokens follow the ranks in a fixed order; after the published file's
100256 ranks that gives them the published ids 100256 ... 100351. A smaller file, as of a model
trained with the same layout, has its special tokens right after its own ranks.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from phireg.api import SourceError

RANKS_FILE = "cl100k_base.tiktoken"
END_OF_TEXT = "<|endoftext|>"
# In the order of their ids, the first right after the last rank. The dummies fill unused rows.
SPECIAL_TOKENS = (
    "<|dummy_id_2|>",
    END_OF_TEXT,
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|dummy_id_0|>",
    "<|dummy_id_1|>",
    "<|end|>",
    *(f"<|dummy_id_{number}|>" for number in range(3, 12)),
    "<|endofprompt|>",
    *(f"<|dummy_id_{number}|>" for number in range(12, 87)),
)
# cl100k's words, as tiktoken split them when the model was published. (Later releases join a
# newline and the spaces after it where a text, or the text before a special token, ends with them.)
_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Phi-3-small directory.

    It pads on the left, adds no tokens to a text, and encodes special tokens that are spelled out
    in it; bos, eos and padding are all ``<|endoftext|>``.

    If the directory also holds the model's config.json, the tokenizer must have exactly the
    model's vocab_size.
    """
    path = Path(directory) / RANKS_FILE
    ranks = _read_ranks(path)
    _check_vocab_size(path, len(ranks) + len(SPECIAL_TOKENS))
    to_text = bytes_to_unicode()
    spelled = {token: "".join(to_text[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    # ignore_merges: a word that is a token is that token, whether or not merges lead to it.
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    hint = "Download the file again from the model's repository."
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SourceError(f"Cannot read {path}: {error.strerror}", hint=hint) from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise SourceError(
                f"{path}, line {number} is not a base64 token and its rank", hint=hint
            ) from None
        if len(ranks) != number:
            raise SourceError(f"{path}, line {number} repeats a token", hint=hint)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise SourceError(f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once", hint=hint)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise SourceError(f"{path}: no token for the byte {missing[0]:#04x}", hint=hint)
    return ranks


def _check_vocab_size(path: Path, size: int) -> None:
    """Refuse a file that was cut off: every special token would silently have a wrong id."""
    try:
        config = json.loads((path.parent / "config.json").read_bytes())
    except (OSError, ValueError):
        return  # a directory with the tokenizer alone; config.json is checked where it is needed
    if not isinstance(config, dict) or config.get("model_type") != "phi3small":
        return
    expected = config.get("vocab_size", size)
    if size != expected:
        raise SourceError(
            f"{path} gives {size} tokens, special tokens included; "
            f"config.json beside it says vocab_size {expected}",
            hint="Take both files from the same model, and check that the download is complete.",
        )
