"""The tokenizer of a checkpoint, loaded without running code from its directory; stop ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from phireg import registry
from phireg.checkpoint.manifest import read_manifest
from phireg.errors import PluginError, SourceError, UsageError
from phireg.files.json import read_json_object
from phireg.reference.quiet import quiet

RANKS_FILES = "*.tiktoken"
# Files that transformers builds a tokenizer from, in order of preference.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# These end a turn of a Phi chat, whatever generation_config.json lists.
_END_OF_TURN = ("<|end|>", "<|im_end|>")
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A transformers tokenizer: text, token ids, and the model's chat template."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.eos_id: int | None = inner.eos_token_id

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Return the token ids of a prompt, with the special tokens that begin it.

        A text of more than ``max_length`` tokens, special ones included, loses its beginning.
        """
        self._inner.truncation_side = "left"
        cut = max_length is not None
        return list(self._inner(text, truncation=cut, max_length=max_length)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens and without cleaning up spaces."""
        text: str = self._inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of tokens as they come, only whole characters until the last piece.

        ``tokenizers.decoders.DecodeStream`` is not used: it raises where the byte tokens of
        Phi-3-mini's tokenizer form no character, which sampling can produce.
        """
        shown: list[int] = []  # the tokens of the last piece: a token's text may depend on them
        pending: list[int] = []
        for token in tokens:
            pending.append(token)
            piece = self._after(shown, pending)
            if piece and not piece.endswith(_REPLACEMENT):
                yield piece
                shown, pending = pending, []
        yield self._after(shown, pending)

    def _after(self, shown: list[int], pending: list[int]) -> str:
        return self.decode(shown + pending)[len(self.decode(shown)) :]

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """Return the tokens that end the model's turn in a chat."""
        added = self._inner.get_added_vocab()
        return frozenset(added[token] for token in _END_OF_TURN if token in added)

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render ``{"role", "content"}`` messages, up to where the model's answer begins.

        Raise UsageError if there is no chat template, or it refuses these messages.
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
        """Return the ids of :meth:`chat_text`; the template writes the first special tokens."""
        return list(self._inner(self.chat_text(messages), add_special_tokens=False)["input_ids"])


def find_tokenizer(checkpoint_dir: Path, tokenizer_dir: Path | None = None) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint, or of another directory.

    The checkpoint's family reads a ``*.tiktoken`` file. Return None if the checkpoint has no
    tokenizer and ``tokenizer_dir`` is None. Raise SourceError if the files are damaged, or cannot
    be used without running their author's code.
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

    # tokenizer.json is the whole tokenizer. Without it, the tokenizer class builds one.
    whole = (directory / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if whole else AutoTokenizer
    options = {} if whole else {"trust_remote_code": False}
    try:
        with quiet():
            return loader.from_pretrained(str(directory), local_files_only=True, **options)
    except Exception as error:  # damaged files raise anything, from KeyError to Rust's errors
        raise SourceError(
            f"the tokenizer in {directory} cannot be loaded: {type(error).__name__}: {error}",
            hint="give --tokenizer-dir a directory with the model's tokenizer.json.",
        ) from None


def _from_family(checkpoint_dir: Path, directory: Path) -> Any:
    name = _family_loader(checkpoint_dir)
    try:
        loader = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"the tokenizer loader {name} cannot be imported: {error}") from error
    return loader(directory)


def _family_loader(checkpoint_dir: Path) -> str:
    """Find ``module:function`` of the family that wrote or reads the checkpoint."""
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
            continue  # reported below if no other family reads the file
        if family.tokenizer and architecture in family.architectures:
            return family.tokenizer
    raise PluginError(
        f"no installed family reads the {RANKS_FILES} tokenizer of {architecture}",
        hint="give --tokenizer-dir a directory with tokenizer.json; phireg plugins --check says "
        "which families are broken.",
    )


def _architecture(config: Mapping[str, Any]) -> Any:
    """Return the architecture of a checkpoint, an engine or a source model."""
    inner, several = config.get("pretrained_config"), config.get("architectures")
    if isinstance(inner, Mapping):
        return inner.get("architecture")
    return config.get("architecture") or (
        several[0] if isinstance(several, list) and several else None
    )


def stop_ids(directory: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the ids that end a text, from the first source that has any.

    The sources are generation_config.json (which lists the end of a turn as well as of a text),
    the tokenizer, and config.json.
    """
    eos_id = tokenizer.eos_id if tokenizer else None
    return (
        _eos_ids(directory / "generation_config.json")
        or (frozenset() if eos_id is None else frozenset({eos_id}))
        or _eos_ids(directory / "config.json")
    )


def _eos_ids(path: Path) -> frozenset[int]:
    value: Any = read_json_object(path).get("eos_token_id") if path.exists() else None
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise SourceError(
            f"{path}: eos_token_id is {value!r}, not a token id or a list of them",
            hint="compare the file with the published one.",
        )
    return frozenset(ids)
