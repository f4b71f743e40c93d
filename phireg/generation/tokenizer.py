"""The tokenizer of a checkpoint, loaded without running code from its directory; stop ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from phireg import registry
from phireg.checkpoint.manifest import read_manifest
from phireg.children import ChildError, call
from phireg.data.row import Content, PaddedIds
from phireg.errors import PhiregError, PluginError, SourceError, UsageError
from phireg.files.json import read_json_object
from phireg.files.kinds import check_loadable
from phireg.files.regular import listed
from phireg.generation.tokenizer_files import FILES, architecture_of, load_files, not_loaded

RANKS_FILES = "*.tiktoken"
# These end a turn of a Phi chat, whatever generation_config.json lists.
_END_OF_TURN = ("<|end|>", "<|im_end|>")
_REPLACEMENT = "\ufffd"
_TEMPLATE_LIMITS: Any = {"seconds": 10.0, "memory": 2**30, "longest": 2**24}
_CHATS = 16  # conversations that one process renders
# Characters of a token that are tried first, and tokens to spare beside a cut.
_CHARACTERS, _SPARE = 8, 256


class Tokenizer:
    """A transformers tokenizer: text, token ids, and the model's chat template."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.eos_id: int | None = inner.eos_token_id

    def encode(
        self, text: str, max_length: int | None = None, *, keep: str = "end", chat: bool = False
    ) -> list[int]:
        """Return the token ids of a text, with the special tokens that begin it.

        Of a text of more than ``max_length`` tokens, special ones included, the ``keep`` is kept,
        "start" or "end". In a ``chat`` the template has written the special tokens. Raise
        UsageError for a text with half of a surrogate pair, which no tokenizer takes.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"not valid Unicode text (character {error.start})") from None
        options: dict[str, Any] = {"add_special_tokens": not chat}
        if max_length is not None:
            self._inner.truncation_side = "left" if keep == "end" else "right"
            text = self._needed(text, max_length, keep)
            options |= {"truncation": True, "max_length": max_length}
        return self._ids(text, **options)

    def _ids(self, text: str, **options: Any) -> list[int]:
        try:
            return list(self._inner(text, verbose=False, **options)["input_ids"])
        except Exception as error:  # a vocabulary without its unknown token, a length that is text
            raise SourceError(
                f"the tokenizer cannot encode a text: {type(error).__name__}: {error}",
                hint="give --tokenizer-dir a directory with the model's tokenizer.json.",
            ) from None

    def _needed(self, text: str, tokens: int, keep: str) -> str:
        """Return the start or the end of a long text, with more tokens than are wanted."""
        # A cut changes the tokens beside it, not those many tokens away.
        size = _CHARACTERS * (tokens + _SPARE)
        while size < len(text):
            part = text[-size:] if keep == "end" else text[:size]
            if len(self._ids(part, add_special_tokens=False)) >= tokens + _SPARE:
                return part
            size *= 2
        return text

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

    def encode_contents(
        self, names: Sequence[str], contents: Sequence[Content], most: int, *, answer: bool = False
    ) -> list[tuple[str | None, list[int]]]:
        """Return text (of ids: None) and token ids, the first ``most``, of what rows hold."""
        chats = {n: c for n, c in enumerate(contents) if isinstance(c, list)}
        texts = self.chat_texts(list(chats.values()), [names[n] for n in chats], answer=answer)
        rendered = dict(zip(chats, texts, strict=True))
        encoded: list[tuple[str | None, list[int]]] = []
        for number, (name, content) in enumerate(zip(names, contents, strict=True)):
            if isinstance(content, tuple):
                encoded.append((None, self._without_padding(name, content)[:most]))
                continue
            text = content if isinstance(content, str) else rendered[number]
            try:
                ids = self.encode(text, most, keep="start", chat=number in rendered)
            except UsageError as error:
                raise UsageError(f"{name}: {error.message}", hint=error.hint) from None
            encoded.append((text, ids))
        return encoded

    def _without_padding(self, name: str, ids: tuple[int, ...]) -> list[int]:
        """Leave out the padding of ids that may have it, as TensorRT-LLM's run.py does."""
        own = self._inner.pad_token_id
        pad = self._inner.eos_token_id if own is None else own
        kept = [i for i in ids if i != pad] if isinstance(ids, PaddedIds) else list(ids)
        if not kept:
            raise UsageError(f"{name}: the row is empty", hint="remove it, or give it tokens.")
        return kept

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render ``{"role", "content"}`` messages, up to where the model's answer begins."""
        return self.chat_texts([messages])[0]

    def chat_texts(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        names: Sequence[str] = (),
        *,
        answer: bool = True,
    ) -> list[str]:
        """Render conversations, with ``answer`` up to where the model's begins; or UsageError."""
        if not conversations:
            return []
        templates, where = self._inner.chat_template, f"{names[0]}: " if names else ""
        if not templates:
            raise UsageError(
                f"{where}the model's tokenizer has no chat template: it was not trained for chat",
                hint="use --prompt, or texts; phi-2 answers to 'Instruct: QUESTION\\nOutput:'.",
            )
        if isinstance(templates, Mapping) and "default" not in templates:
            raise UsageError(
                f"{where}the model's chat templates are named {listed(list(templates))}, and none "
                "of them 'default'",
                hint="rename the one to use to 'default' in tokenizer_config.json.",
            )

        texts = []
        for start in range(0, len(conversations), _CHATS):
            part = slice(start, start + _CHATS)
            texts += self._rendered(conversations[part], names[part], answer)
        return texts

    def _rendered(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        names: Sequence[str],
        answer: bool,
    ) -> list[str]:
        def render() -> str:
            return json.dumps(
                [
                    self._inner.apply_chat_template(
                        list(messages), tokenize=False, add_generation_prompt=answer
                    )
                    for messages in conversations
                ]
            )

        try:  # a template is a program of its author's
            texts: list[str] = json.loads(call(render, **_TEMPLATE_LIMITS))
            return texts
        except ChildError as error:
            if len(conversations) > 1:  # which one?
                parts = [slice(n, n + 1) for n in range(len(conversations))]
                alone = [self._rendered(conversations[p], names[p], answer) for p in parts]
                return [text for texts in alone for text in texts]
            where = "".join(f"{name}: " for name in names)
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"{where}the model's chat template refuses this: {reason}") from None

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of :meth:`chat_text`; the template writes the first special tokens."""
        return self.encode(self.chat_text(messages), chat=True)


def has_tokenizer(directory: Path) -> bool:
    """Return whether there are files of a tokenizer in a directory."""
    return any(any(directory.glob(name)) for name in (*FILES, RANKS_FILES))


def find_tokenizer(checkpoint_dir: Path, tokenizer_dir: Path | None = None) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint, or of another directory.

    The checkpoint's family reads a ``*.tiktoken`` file. Return None if the checkpoint has no
    tokenizer and ``tokenizer_dir`` is None. Raise SourceError if the files are damaged, or cannot
    be used without running their author's code.
    """
    directory = checkpoint_dir if tokenizer_dir is None else tokenizer_dir
    if directory.is_dir():
        check_loadable(directory)
    if any((directory / name).is_file() for name in FILES):
        return Tokenizer(load_files(directory))
    if any(directory.glob(RANKS_FILES)):
        return Tokenizer(_from_family(checkpoint_dir, directory))
    if tokenizer_dir is None:
        return None
    if not directory.is_dir():
        raise UsageError(f"no such directory: {directory}", hint="give --tokenizer-dir another.")
    raise UsageError(
        f"{directory} holds no tokenizer: none of {', '.join(FILES)}, {RANKS_FILES}",
        hint="give --tokenizer-dir the directory of the source model.",
    )


def _from_family(checkpoint_dir: Path, directory: Path) -> Any:
    name = _family_loader(checkpoint_dir)
    try:
        loader = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"the tokenizer loader {name} cannot be imported: {error}") from error
    try:
        return loader(directory)
    except PhiregError:
        raise
    except Exception as error:  # it reads the same damaged files
        raise not_loaded(directory, error) from None


def _family_loader(checkpoint_dir: Path) -> str:
    """Find ``module:function`` of the family that wrote or reads the checkpoint."""
    manifest = read_manifest(checkpoint_dir) or {}
    block = manifest.get("family")
    written_by = block.get("name") if isinstance(block, dict) else None
    candidates = [c for offers in registry.index().values() for c in offers]
    candidates.sort(key=lambda candidate: candidate.name != written_by)
    architecture = architecture_of(read_json_object(checkpoint_dir / "config.json"))
    for candidate in candidates:
        try:
            family = candidate.load()
        except PluginError:
            continue  # reported below if no other family reads the file
        if family.tokenizer and architecture in family.architectures:
            return family.tokenizer
    raise PluginError(
        f"no installed family reads the {RANKS_FILES} tokenizer of {architecture}",
        hint="give --tokenizer-dir a directory with tokenizer.json; phireg families --check says "
        "which families are broken.",
    )


def stop_ids(directory: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the ids of generation_config.json, the tokenizer or config.json that end a text."""
    eos_id = tokenizer.eos_id if tokenizer else None
    return (
        _eos_ids(directory / "generation_config.json")
        or (frozenset() if eos_id is None else frozenset({eos_id}))
        or _eos_ids(directory / "config.json")
    )


def _eos_ids(path: Path) -> frozenset[int]:
    value: Any = read_json_object(path).get("eos_token_id") if os.path.lexists(path) else None
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise SourceError(
            f"{path}: eos_token_id is {value!r}, not a token id or a list of them",
            hint="compare the file with the published one.",
        )
    return frozenset(ids)
