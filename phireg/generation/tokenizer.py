"""The tokenizer of a checkpoint: found among its files and loaded without running any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from phireg import registry
from phireg.checkpoint.manifest import read_manifest
from phireg.errors import PluginError, SourceError, UsageError
from phireg.files.json import read_json_object
from phireg.reference.quiet import quiet

RANKS_FILES = "*.tiktoken"
# What transformers builds a tokenizer from, the best first.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# A turn of a Phi chat ends with one of these, whatever generation_config.json says.
_END_OF_TURN = ("<|end|>", "<|im_end|>")


class Tokenizer:
    """Text to token ids and back, and the model's chat template.

    Args:
        inner: a transformers tokenizer.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.eos_id: int | None = inner.eos_token_id

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model's prompts begin with.

        Args:
            text: the prompt.
            max_length: tokens at most, special ones included; the text's beginning is cut off.
        """
        if max_length is None:
            return list(self._inner(text)["input_ids"])
        self._inner.truncation_side = "left"
        return list(self._inner(text, truncation=True, max_length=max_length)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens, and without any cosmetics."""
        text: str = self._inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """The tokens that end the model's turn in a chat."""
        added = self._inner.get_added_vocab()
        return frozenset(added[token] for token in _END_OF_TURN if token in added)

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as the model was trained to read it, up to where its answer begins.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text}``, in order.

        Raises:
            UsageError: the tokenizer has no chat template, or it refuses these messages.
        """
        if not self._inner.chat_template:
            raise UsageError(
                "the model's tokenizer has no chat template: it was not trained for chat",
                hint="use --prompt; phi-2 answers to 'Instruct: QUESTION\\nOutput:'.",
            )
        from jinja2 import TemplateError

        try:
            text: str = self._inner.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UsageError(f"the model's chat template refuses this: {error}") from None
        return text

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of :meth:`chat_text`; the template itself writes what the prompt begins with.

        Raises:
            UsageError: as :meth:`chat_text`.
        """
        return list(self._inner(self.chat_text(messages), add_special_tokens=False)["input_ids"])


def find_tokenizer(checkpoint_dir: Path, tokenizer_dir: Path | None = None) -> Tokenizer | None:
    """The tokenizer that a checkpoint carries, or that of another directory.

    Args:
        checkpoint_dir: a checkpoint; says which family a ``*.tiktoken`` file belongs to.
        tokenizer_dir: where to look instead: the source model's directory, for example.

    Returns:
        The tokenizer; None if the checkpoint carries none and no other directory was named.

    Raises:
        UsageError: ``tokenizer_dir`` holds no tokenizer.
        SourceError: the files are damaged, or cannot be used without running their author's code.
        PluginError: the family that reads the ``*.tiktoken`` file cannot be loaded.
    """
    directory = checkpoint_dir if tokenizer_dir is None else tokenizer_dir
    if any((directory / name).is_file() for name in _FILES):
        return Tokenizer(_from_transformers(directory))
    if any(directory.glob(RANKS_FILES)):
        return Tokenizer(_from_family(checkpoint_dir, directory))
    if tokenizer_dir is None:
        return None
    if not directory.is_dir():
        raise UsageError(f"no such directory: {directory}", hint="give --tokenizer-dir another.")
    raise UsageError(
        f"{directory} holds no tokenizer: none of {', '.join(_FILES)}, {RANKS_FILES}",
        hint="give --tokenizer-dir the directory of the source model.",
    )


def _from_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is the whole tokenizer. Without it, its class says how to build one.
    whole = (directory / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if whole else AutoTokenizer
    options = {} if whole else {"trust_remote_code": False}
    try:
        with quiet():
            return loader.from_pretrained(str(directory), local_files_only=True, **options)
    except Exception as error:  # a damaged file shows in any way, from KeyError to Rust's own
        raise SourceError(
            f"the tokenizer in {directory} cannot be loaded: {type(error).__name__}: {error}",
            hint="give --tokenizer-dir a directory with the model's tokenizer.json.",
        ) from None


def _from_family(checkpoint_dir: Path, directory: Path) -> Any:
    where = _family_loader(checkpoint_dir)
    try:
        loader = resolve_name(where)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"the tokenizer loader {where} cannot be imported: {error}") from error
    return loader(directory)


def _family_loader(checkpoint_dir: Path) -> str:
    """``module:function`` of the family that wrote the checkpoint, or of its architecture."""
    manifest = read_manifest(checkpoint_dir)
    family = manifest.get("family") if manifest else None
    written_by = family.get("name") if isinstance(family, dict) else None
    candidates = [c for offers in registry.index().values() for c in offers]
    candidates.sort(key=lambda candidate: candidate.name != written_by)
    architecture = _architecture(read_json_object(checkpoint_dir / "config.json"))
    for candidate in candidates:
        try:
            family = candidate.load()
        except PluginError:
            continue  # another family's defect, unless nobody is left: then it is named below
        if family.tokenizer and architecture in family.architectures:
            return family.tokenizer
    raise PluginError(
        f"no installed family reads the {RANKS_FILES} tokenizer of {architecture}",
        hint="give --tokenizer-dir a directory with tokenizer.json; phireg plugins --check says "
        "which families are broken.",
    )


def _architecture(config: Mapping[str, Any]) -> Any:
    """Of a checkpoint, an engine or a source model."""
    inner, several = config.get("pretrained_config"), config.get("architectures")
    if isinstance(inner, Mapping):
        return inner.get("architecture")
    return config.get("architecture") or (
        several[0] if isinstance(several, list) and several else None
    )
