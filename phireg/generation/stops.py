"""Which tokens end a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.generation.tokenizer import Tokenizer


def stop_ids(checkpoint_dir: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The ids that end a text: those of the first that names any.

    These are generation_config.json (which knows the end of a turn as well as of a text), the
    tokenizer, and the checkpoint's config.json.

    Args:
        checkpoint_dir: the checkpoint; convert carries generation_config.json along.
        tokenizer: the model's, if there is one.

    Raises:
        SourceError: a file names something that is no id.
    """
    own = tokenizer.eos_id if tokenizer else None
    return (
        _named_in(checkpoint_dir / "generation_config.json")
        or (frozenset() if own is None else frozenset({own}))
        or _named_in(checkpoint_dir / "config.json")
    )


def _named_in(path: Path) -> frozenset[int]:
    if not path.exists():
        return frozenset()
    value: Any = read_json_object(path).get("eos_token_id")
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise SourceError(
            f"{path}: eos_token_id is {value!r}, not a token id or a list of them",
            hint="compare the file with the one that was published.",
        )
    return frozenset(ids)
