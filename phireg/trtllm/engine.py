"""Describe a built engine from its files, without TensorRT-LLM.

TensorRT-LLM's builder writes ``config.json`` with ``version``, ``pretrained_config`` (the
checkpoint's config) and ``build_config``, and ``rank{r}.engine`` for every rank. ``phireg build``
adds ``phireg-build.json``, which holds among others the options that became run-time options.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phireg.checkpoint.rankfiles import world_size
from phireg.errors import CheckError, SourceError
from phireg.files.json import read_json_object
from phireg.files.kinds import BUILD_FILE, ENGINE, check_kind
from phireg.reader.config import Config


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
    max_num_tokens: int | None = None  # of one step, which takes a whole prompt
    long_rope_switch: int | None = None  # tokens above which long rope takes the long factors
    run_options: Mapping[str, Any] = field(default_factory=dict)
    build_config: Mapping[str, Any] = field(default_factory=dict)


def read_engine(directory: str | Path) -> Engine:
    """Read an engine's config and look for its rank files; raise what is wrong with them."""
    directory = Path(directory)
    check_kind(directory, ENGINE)
    path = directory / "config.json"
    config = read_json_object(path)
    engine = Config(config, str(path))
    pretrained, build = engine.block("pretrained_config"), engine.block("build_config")
    ranks = world_size(pretrained.values)
    for rank in range(ranks):
        if not (directory / f"rank{rank}.engine").is_file():
            raise CheckError(f"{directory} has no rank{rank}.engine; it is made for {ranks}")
    max_input_len = build.integer("max_input_len")
    if build.has("max_seq_len"):
        max_seq_len = build.integer("max_seq_len")
    else:  # before 0.11 the new tokens were limited, not the sum
        max_seq_len = max_input_len + build.integer("max_output_len")
    return Engine(
        directory=directory,
        version=engine.text("version"),
        architecture=pretrained.text("architecture"),
        dtype=pretrained.text("dtype"),
        vocab_size=pretrained.integer("vocab_size"),
        tp_size=pretrained.block("mapping").integer("tp_size", default=1),
        world_size=ranks,
        max_batch_size=build.integer("max_batch_size"),
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        max_beam_width=build.integer("max_beam_width", default=1),
        gathers_logits=build.values.get("gather_context_logits") is True,
        max_num_tokens=build.integer("max_num_tokens") if build.has("max_num_tokens") else None,
        long_rope_switch=pretrained.integer("original_max_position_embeddings")
        if pretrained.has("longrope_scaling_short_factors")
        else None,
        run_options=_run_options(directory / BUILD_FILE),
        build_config=build.values,
    )


def _run_options(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}  # built by trtllm-build alone
    options = read_json_object(path).get("run_options")
    if not isinstance(options, dict):
        raise SourceError(f"{path}: run_options is not an object")
    return options
