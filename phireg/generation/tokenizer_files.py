"""Tokenizers that transformers reads from files, made to encode as the source's release did."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phireg.errors import PhiregWarning, SourceError
from phireg.files.json import read_json_object
from phireg.reference.quiet import quiet

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that transformers builds a tokenizer from, in order of preference."""

_PROBE = "The tokens of a text, 1 to 20"
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
_LLAMA_MODELS = ("LlamaForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM", "PhimoeForCausalLM")


def load_files(directory: Path) -> Any:
    """Load the tokenizer of a directory that has one of FILES; no code of it is run."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is the whole tokenizer. Without it, the tokenizer class builds one.
    whole, pieces = (directory / "tokenizer.json").is_file(), directory / "tokenizer.model"
    if not whole and pieces.is_file():
        _check_sentencepiece(pieces)
    elif not whole and _architecture(directory) in ("Phi3ForCausalLM", "LlamaForCausalLM"):
        raise SourceError(
            f"{directory} has vocab.json and no tokenizer.json, which alone says where Phi-4's "
            "tokenizers split a text: the class would split it as GPT-2's does",
            hint="put the model's tokenizer.json there.",
        )
    loader = PreTrainedTokenizerFast if whole else AutoTokenizer
    options = {} if whole else {"trust_remote_code": False}
    try:
        with quiet():
            inner = loader.from_pretrained(str(directory), local_files_only=True, **options)
    except Exception as error:  # damaged files raise anything, from KeyError to Rust's errors
        raise not_loaded(directory, error) from None
    if not whole and pieces.is_file():
        _compare_with_sentencepiece(inner, pieces)
    _add_bos_and_eos(inner, directory)
    return inner


def _check_sentencepiece(path: Path) -> None:
    missing = [
        package
        for package, module in (("sentencepiece",) * 2, ("protobuf", "google.protobuf"))
        if not _is_installed(module)
    ]
    if missing:
        raise SourceError(
            f"{path} needs {' and '.join(missing)}, not installed here",
            hint="pip install 'phireg[sentencepiece]'; or put the model's tokenizer.json there.",
        )


def _compare_with_sentencepiece(inner: Any, path: Path) -> None:
    """Refuse what transformers 5.0 makes of the file: unknown tokens."""
    from sentencepiece import SentencePieceProcessor

    expected = SentencePieceProcessor(model_file=str(path)).encode(_PROBE)
    if inner(_PROBE, add_special_tokens=False)["input_ids"] != expected:
        raise SourceError(
            f"the installed transformers encodes texts otherwise than {path} says",
            hint="install a later transformers, or put the model's tokenizer.json there.",
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _add_bos_and_eos(inner: Any, directory: Path) -> None:
    """Begin and end texts as the tokenizer's class in transformers 4 did.

    LlamaTokenizer, the class of Phi-3-mini, Phi-3-medium and Phi-MoE, took ``add_bos_token`` (true
    where it is absent) and ``add_eos_token`` (false) from tokenizer_config.json and replaced what
    tokenizer.json says. No other class of a Phi model did. transformers 5 follows tokenizer.json,
    and names another class when it saves.
    """
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json_object(path)
    name = config.get("tokenizer_class")
    if name is None and _architecture(directory) in _LLAMA_MODELS:
        name = _LLAMA[0] if inner.bos_token in (None, "<s>") else None  # Phi-4 has another
    if name not in _LLAMA:
        return
    from tokenizers.processors import TemplateProcessing

    ends = {}
    for key, default, token in (
        ("add_bos_token", True, inner.bos_token or "<s>"),
        ("add_eos_token", False, inner.eos_token or "</s>"),
    ):
        value = config.get(key, default)
        if not isinstance(value, bool):
            raise SourceError(f"{path}: {key} is {value!r}, neither true nor false")
        number = inner.backend_tokenizer.token_to_id(token)
        if value and number is None:
            raise SourceError(
                f"{path}: {key} is true, and the vocabulary has no {token}",
                hint="compare the file with the published one.",
            )
        ends[key] = [(token, number)] if value else []
    before = inner("a")["input_ids"]
    bos, eos = ends.values()
    single = " ".join([*(token for token, _ in bos), "$A", *(token for token, _ in eos)])
    inner.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=list(dict([*bos, *eos]).items())
    )
    if before != (after := inner("a")["input_ids"]):
        said = ", ".join(
            f"{key} {'true' if end else 'false'}" + ("" if key in config else " by default")
            for key, end in ends.items()
        )
        warnings.warn(
            f"{directory}: tokenizer.json encodes 'a' as {before}, and tokenizer_config.json "
            f"({said}) as {after}. The latter is followed, as transformers 4 did for {name}; "
            "transformers 5 follows the former",
            PhiregWarning,
            stacklevel=2,
        )


def _architecture(directory: Path) -> Any:
    model = directory / "config.json"
    return architecture_of(read_json_object(model)) if model.is_file() else None


def not_loaded(directory: Path, error: Exception) -> SourceError:
    """Return the error for a tokenizer's damaged files."""
    # The text of a library's error may quote the file.
    return SourceError(
        f"the tokenizer in {directory} cannot be loaded: a damaged file ({type(error).__name__})",
        hint="give --tokenizer-dir a directory with the model's tokenizer.json.",
    )


def architecture_of(config: Mapping[str, Any]) -> Any:
    """Return the architecture of a checkpoint, an engine or a source model."""
    inner, several = config.get("pretrained_config"), config.get("architectures")
    if isinstance(inner, Mapping):
        return inner.get("architecture")
    return config.get("architecture") or (
        several[0] if isinstance(several, list) and several else None
    )
