"""Kinds of directories, told apart by config.json and the names of the entries."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.files.regular import Limit, open_regular

MANIFEST = "phireg.json"
"""The file in which phireg describes a checkpoint."""

BUILD_FILE = "phireg-build.json"
"""The file in which phireg describes an engine."""

TOKENIZER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "*.tiktoken",
)
"""Patterns of the files that travel with the weights: what tokenizers need, no code."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weights of a Hugging Face model; sharded ones have ``<name>.index.json`` instead."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of directory."""

    name: str  # for messages, with its article
    advice: str  # what to do with it where a Hugging Face model is needed
    entries: str  # pattern of the names of the entries that tell the kind
    files: tuple[str, ...] = ()  # patterns of all files that phireg may have written into one
    required: str = ""  # the file that every one has


_ORIGINAL = "give the original Hugging Face checkpoint instead"

ENGINE = Kind(
    "a built engine",
    "an engine cannot be converted back; give the Hugging Face checkpoint it was built from",
    r"rank.*\.engine",
    (
        "config.json",
        BUILD_FILE,
        "rank[0-9]*.engine",
        "rank[0-9]*_managed_weights.safetensors",
        *TOKENIZER_FILES,
    ),
    "rank0.engine",
)
CHECKPOINT = Kind(
    "a TensorRT-LLM checkpoint",
    "build an engine from it with phireg build, or give the Hugging Face checkpoint instead",
    r"rank\d+\.safetensors",
    ("config.json", "quant_cfg.json", MANIFEST, "rank[0-9]*.safetensors", *TOKENIZER_FILES),
    "rank0.safetensors",
)
HF_MODEL = Kind("a Hugging Face model", "", "")
QUANTIZED_MODEL = Kind(
    "a Hugging Face directory that phireg wrote",
    "",
    "",
    (
        "config.json",
        "hf_quant_config.json",
        MANIFEST,
        "README.md",
        "model*.safetensors",
        "model.safetensors.index.json",
        *TOKENIZER_FILES,
    ),
    MANIFEST,
)
"""What may be replaced by another; to readers it is a Hugging Face model."""
UNKNOWN = Kind("an unknown directory", "", "")

_INSTEAD = {
    CHECKPOINT: "to run it: phireg run {directory} (--backend executor); to make an engine of it: "
    "phireg build {directory} --output-dir ENGINE",
    ENGINE: "to run it: phireg run {directory} (--backend tensorrt-llm); it cannot be converted "
    "back, so elsewhere give the checkpoint that it was built from.",
    HF_MODEL: "to run it: phireg run {directory} (--backend hf if it is not quantized); to compare "
    "a quantized one with its model: phireg verify {directory} --model-dir MODEL; to convert one "
    "that is not: phireg convert --model-dir {directory} --output-dir CKPT",
}
"""What to do with a directory of a kind that is not wanted."""

_BY_ENTRIES = (
    ENGINE,
    CHECKPOINT,
    Kind(
        "a LoRA adapter without its base model",
        "merge it into the base model first: peft's merge_and_unload(), then save_pretrained()",
        r"adapter_config\.json|adapter_model\..*",
    ),
    Kind(
        "a DeepSpeed ZeRO checkpoint",
        "collect its weights first: python zero_to_fp32.py . OUTPUT, in that directory",
        r"zero_to_fp32\.py|global_step\d+|zero_pp_rank_.*|mp_rank_.*_model_states\.pt",
    ),
    Kind(
        "an FSDP checkpoint",
        "collect its weights first: accelerate merge-weights DIRECTORY OUTPUT",
        r"pytorch_model_fsdp(_\d+)?(\.bin)?|fsdp_model.*|__\d+_\d+\.distcp",
    ),
    Kind(
        "a torchtune checkpoint",
        "save it in the Hugging Face format (torchtune's FullModelHFCheckpointer with safetensors)",
        r"hf_model_\d+_\d+\.pt|meta_model_\d+\.pt|recipe_state(\.pt)?|torchtune_config\.yaml",
    ),
    Kind(
        "a trainer's output directory",
        "give one of its checkpoint-N or epoch_N folders",
        r"checkpoint-\d+|epoch_\d+",
    ),
    Kind("a GGUF model", _ORIGINAL, r".*\.gguf|gguf"),
    Kind("an ONNX model", _ORIGINAL, r".*\.onnx(\.data)?|onnx|cpu_and_mobile|directml"),
    Kind("a model quantized with GPTQ", _ORIGINAL, r"quantize_config\.json|gptq_model.*"),
    Kind("a model quantized with AWQ", _ORIGINAL, r"quant_config\.json|awq_model.*"),
    Kind(
        "a sharded checkpoint without its index",
        "download model.safetensors.index.json (or pytorch_model.bin.index.json) as well",
        r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)",
    ),
    Kind("a model quantized with ModelOpt", _ORIGINAL, r"hf_quant_config\.json"),
    Kind(
        "a checkpoint in the original authors' consolidated layout",
        "give the Hugging Face layout of the same model (model.safetensors and config.json)",
        r"consolidated.*\..*",
    ),
    Kind(
        "a Flax checkpoint",
        "load it with transformers (from_flax=True) and save it with save_pretrained()",
        r"flax_model.*\.msgpack",
    ),
    Kind(
        "a TensorFlow checkpoint",
        "load it with transformers (from_tf=True) and save it with save_pretrained()",
        r"tf_model.*\.h5",
    ),
    Kind(
        "a repository folder of the Hugging Face cache",
        "give the folder of one revision inside it: snapshots/<commit>",
        "snapshots",
    ),
)


def producer() -> dict[str, str]:
    """Return what phireg says of itself in the files that describe a directory."""
    return {"name": "phireg", "version": metadata.version("phireg")}


def kind_of(directory: Path) -> Kind:
    """Return what a directory is; UNKNOWN if it cannot be read, too."""
    try:
        names = set(os.listdir(directory))  # noqa: PTH208 - names only
    except (OSError, ValueError):
        return UNKNOWN
    try:
        by_config = kind_of_config(read_json_object(directory / "config.json"))
    except SourceError:
        by_config = UNKNOWN
    if by_config in (ENGINE, CHECKPOINT):
        return by_config
    if any(name in names or f"{name}.index.json" in names for name in WEIGHTS):
        return HF_MODEL
    return kind_of_entries(names)[0] or by_config


def check_kind(directory: Path, *kinds: Kind) -> Kind:
    """Return which of the kinds a directory is; a SourceError says what else it is."""
    *others, last = dict.fromkeys(kind.name for kind in kinds)
    names = f"{', '.join(others)} or {last}" if others else last
    if not directory.is_dir():
        problem = "this is a file, not a" if directory.is_file() else "no such"
        raise SourceError(f"{directory}: {problem} directory", hint=f"give {names}.")
    kind = kind_of(directory)
    if kind in kinds:
        return kind
    if kind is not UNKNOWN:
        hint = _INSTEAD.get(kind, kind.advice).format(directory=directory)
        raise SourceError(f"{directory} is {kind.name}, not {names}", hint=hint)
    problem = "it holds no config.json"
    if os.path.lexists(directory / "config.json"):
        read_json_object(directory / "config.json")
        problem = "its config.json is of something else"
    raise SourceError(f"{directory} is not {names}: {problem}", hint=f"give {names}.")


def kind_of_config(config: Mapping[str, Any]) -> Kind:
    """Return the kind of directory that a config.json is of; UNKNOWN for any other JSON object."""
    if all(isinstance(config.get(key), dict) for key in ("pretrained_config", "build_config")):
        return ENGINE
    if isinstance(config.get("architecture"), str):
        return CHECKPOINT
    return HF_MODEL if "architectures" in config or "model_type" in config else UNKNOWN


def kind_of_entries(names: Collection[str]) -> tuple[Kind | None, str]:
    """Return the kind of a directory without Hugging Face weights, and the entry that tells it."""
    for kind in _BY_ENTRIES:
        for name in sorted(names):
            if re.fullmatch(kind.entries, name):
                return kind, name
    return None, ""


def objection(directory: Path, kind: Kind) -> str | None:
    """Return why a directory is not of ``kind`` (ENGINE, CHECKPOINT) alone; None if it is."""
    for entry in sorted(directory.iterdir()):
        known = any(fnmatchcase(entry.name, pattern) for pattern in kind.files)
        if not known or entry.is_symlink() or not entry.is_file():
            return f"{entry} does not belong to one"
    if not (directory / kind.required).exists():
        return f"{directory} has no {kind.required}"
    try:
        config = read_json_object(directory / "config.json")
    except SourceError as error:
        return error.message
    if kind_of_config(config) is not (HF_MODEL if kind is QUANTIZED_MODEL else kind):
        return f"{directory / 'config.json'} is not that of {kind.name}"
    return None


def file_sizes(directory: Path) -> dict[str, int]:
    """Return the bytes of every file of a directory by its name, sorted."""
    return {
        file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.is_file()
    }


def check_loadable(directory: Path) -> None:
    """Refuse files of these names that are none (a pipe would be waited for) or lie elsewhere."""
    tokenizer_files(directory, "config.json", "tokenizer.*.json", "chat_template.json")
    if (templates := directory / "chat_templates").is_dir():
        tokenizer_files(templates, "*")


def tokenizer_files(directory: Path, *more: str) -> list[Path]:
    """Return the files for tokenizer and generation, checked; ``more`` are further patterns."""
    patterns = (*TOKENIZER_FILES, *more)
    files = [
        directory / name
        for name in sorted(os.listdir(directory))  # noqa: PTH208 - names only
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    for file in files:
        os.close(open_regular(file, limit=Limit.TOKENIZER))
    return files
