"""What a directory without Hugging Face weights is, and what its owner can do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from phireg.errors import SourceError

_RANK_FILE = re.compile(r"rank\d+\.safetensors")
_SHARD_FILE = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")

# The first row whose test some file name passes decides: (test, what the directory is, advice).
_KINDS: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (
        lambda name: fnmatchcase(name, "rank*.engine"),
        "a built TensorRT-LLM engine",
        "an engine cannot be converted back; give the Hugging Face checkpoint it was built from",
    ),
    (
        lambda name: _RANK_FILE.fullmatch(name) is not None,
        "a TensorRT-LLM checkpoint, converted already",
        "build an engine from it with phireg build, or give the Hugging Face checkpoint instead",
    ),
    (
        lambda name: name == "adapter_config.json" or fnmatchcase(name, "adapter_model.*"),
        "a LoRA adapter without its base model",
        "merge it into the base model first: peft's merge_and_unload(), then save_pretrained()",
    ),
    (
        lambda name: name.endswith(".gguf"),
        "a GGUF model",
        "give the original Hugging Face checkpoint instead",
    ),
    (
        lambda name: name.endswith((".onnx", ".onnx.data")),
        "an ONNX model",
        "give the original Hugging Face checkpoint instead",
    ),
    (
        lambda name: _SHARD_FILE.fullmatch(name) is not None,
        "a sharded checkpoint without its index",
        "download model.safetensors.index.json (or pytorch_model.bin.index.json) as well",
    ),
    (
        lambda name: fnmatchcase(name, "consolidated*.*"),
        "a checkpoint in the original authors' consolidated layout",
        "give the Hugging Face layout of the same model (model.safetensors and config.json)",
    ),
    (
        lambda name: fnmatchcase(name, "flax_model*.msgpack"),
        "a Flax checkpoint",
        "load it with transformers (from_flax=True) and save it with save_pretrained()",
    ),
    (
        lambda name: fnmatchcase(name, "tf_model*.h5"),
        "a TensorFlow checkpoint",
        "load it with transformers (from_tf=True) and save it with save_pretrained()",
    ),
    (
        lambda name: name == "snapshots",
        "a repository folder of the Hugging Face cache",
        "give the folder of one revision inside it: snapshots/<commit>",
    ),
)


def no_weights_error(directory: Path, names: Collection[str]) -> SourceError:
    """Explain a directory in which no weights file was found.

    Args:
        directory: the directory, for the message.
        names: the names of its entries.

    Returns:
        The error to raise.
    """
    if not names:
        return SourceError(f"{directory}: the directory is empty", hint=_EXPECTED)
    for test, what, advice in _KINDS:
        found = next((name for name in sorted(names) if test(name)), None)
        if found is not None:
            return SourceError(f"{directory}: this is {what} ({found})", hint=advice)
    if others := weight_files(names, (".safetensors", ".bin", ".pt", ".pth", ".ckpt")):
        return SourceError(
            f"{directory}: no weights under a name that is known here, only {', '.join(others)}",
            hint=_EXPECTED,
        )
    return SourceError(f"{directory}: there are no weights in this directory", hint=_EXPECTED)


def weight_files(names: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    """The names that end like weight files, sorted; a trainer's own state is not counted."""
    return sorted(
        name
        for name in names
        if name.endswith(suffixes) and not name.startswith(("training_args", "optimizer"))
    )


_EXPECTED = (
    "expected config.json and model.safetensors, model.safetensors.index.json with its shards, "
    "or the same as pytorch_model.bin"
)
