"""Describe a built engine from its files, without TensorRT-LLM.

TensorRT-LLM's builder writes ``config.json`` with ``version``, ``pretrained_config`` (the
checkpoint's config) and ``build_config``, and ``rank{r}.engine`` for every rank. ``phireg build``
adds ``phireg-build.json``, which holds among others the options that became run-time options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phireg.checkpoint.rankfiles import world_size
from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.files.kinds import BUILD_FILE, ENGINE, kind_of_config


@dataclass(frozen=True, slots=True)
class Engine:
    """The content of an engine directory; lengths are in tokens.

    ``run_options`` are those that the runtime has to be told, by the names of TensorRT-LLM's
    runners (``enable_context_fmha_fp32_acc``: bool).
    """

    directory: Path
    version: str  # the TensorRT-LLM release that built it and can run it, e.g. "0.17.0.post1"
    architecture: str
    dtype: str  # of the checkpoint
    vocab_size: int
    tp_size: int
    world_size: int  # rank engines
    max_batch_size: int
    max_input_len: int  # as it was asked for
    max_seq_len: int  # prompt and continuation together
    max_beam_width: int
    gathers_logits: bool  # gives the logits of the prompt's tokens
    run_options: Mapping[str, Any] = field(default_factory=dict)
    build_config: Mapping[str, Any] = field(default_factory=dict)


def read_engine(directory: str | Path) -> Engine:
    """Read an engine's config and look for its rank files.

    Raises:
        SourceError: it is not a complete engine.
    """
    directory = Path(directory)
    path = directory / "config.json"
    config = read_json_object(path)
    if kind_of_config(config) is not ENGINE:
        raise SourceError(
            f"{directory} is not a TensorRT-LLM engine: its config.json has no 'pretrained_config' "
            "and 'build_config'",
            hint="an engine is made from a checkpoint by phireg build.",
        )
    pretrained, build = config["pretrained_config"], config["build_config"]
    mapping = pretrained.get("mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    ranks = world_size(pretrained)
    for rank in range(ranks):
        if not (directory / f"rank{rank}.engine").is_file():
            raise SourceError(f"{directory} has no rank{rank}.engine; it is made for {ranks}")
    max_input_len = _count(build, "max_input_len", path)
    if "max_seq_len" in build:
        max_seq_len = _count(build, "max_seq_len", path)
    else:  # before 0.11 the new tokens were limited, not the sum
        max_seq_len = max_input_len + _count(build, "max_output_len", path)
    return Engine(
        directory=directory,
        version=_text(config, "version", path),
        architecture=_text(pretrained, "architecture", path),
        dtype=_text(pretrained, "dtype", path),
        vocab_size=_count(pretrained, "vocab_size", path),
        tp_size=_count(mapping, "tp_size", path, 1),
        world_size=ranks,
        max_batch_size=_count(build, "max_batch_size", path),
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        max_beam_width=_count(build, "max_beam_width", path, 1),
        gathers_logits=build.get("gather_context_logits") is True,
        run_options=_run_options(directory / BUILD_FILE),
        build_config=build,
    )


def _text(config: Mapping[str, Any], key: str, path: Path) -> str:
    value = config.get(key)
    if not isinstance(value, str):
        raise SourceError(f"{path}: {key} is {value!r}, not a text")
    return value


def _count(config: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise SourceError(f"{path}: {key} is {value!r}, not a number of 1 or more")
    return value


def _run_options(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}  # built by trtllm-build alone
    options = read_json_object(path).get("run_options")
    if not isinstance(options, dict):
        raise SourceError(f"{path}: run_options is not an object")
    return options
