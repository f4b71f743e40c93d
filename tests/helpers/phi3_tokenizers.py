"""Tiny tokenizers with the structure of Phi-3-mini's published files (LlamaTokenizer)."""

import io
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

SPECIAL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
MERGES = "l l,▁ H,e ll,▁H ell,▁Hell o,▁ w,o r,▁w or,▁wor l,▁worl d"
BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
NONE = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])


def write_tokenizer(directory, post_processor=NONE, **config):
    """Write tokenizer.json and tokenizer_config.json; a value of None leaves a key out.

    "Hello world" is [271, 276] without special tokens; <s> is 1, <|endoftext|> 277.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    merges = [tuple(pair.split(" ")) for pair in MERGES.split(",")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁Helowrd", *(left + right for left, right in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    inner = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", *SPECIAL)]
    )
    inner.post_processor = post_processor
    inner.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "legacy": False,
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
        **config,
    }
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    return directory


def write_sentencepiece(directory):
    """Write tokenizer.model, added_tokens.json and tokenizer_config.json; return the library's."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"the quick brown fox {n} jumps over lazy dogs" for n in range(400)),
        model_writer=made,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(made.getvalue())
    own = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    added = {token: own.get_piece_size() + n for n, token in enumerate(SPECIAL)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|endoftext|>", '
        '"unk_token": "<unk>", "add_bos_token": true, "legacy": false}'
    )
    return own
