"""Random source checkpoints of any family and size, written without holding them in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phireg.config.hf import HFConfig
from phireg.errors import UsageError
from phireg.family import Family
from phireg.files.safetensors import encode_header
from phireg.planning.companions import axes_of

_POOL = 2**22
_SHARD = "model-{:05d}-of-{:05d}.safetensors"

Shape = tuple[int, ...]


def source_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes of a family's source tensors, as its rules' first alternatives want them.

    Raises:
        UsageError: the config is not one the family can translate.
    """
    hf = HFConfig(config)
    translation = family.config_fields().translate(hf)
    if not translation.ok:
        raise UsageError(f"{family.name}: " + "; ".join(f.detail for f in translation.findings))
    shapes: dict[str, Shape] = {}
    for rule in family.weight_rules(translation.fields, hf).values():
        for companion, alternatives in rule.tensors.items():
            follows = axes_of(companion, None, alternatives[0].length)
            cols = (rule.cols.length,) if rule.cols and "cols" in follows else ()
            for module, rows in alternatives[0].sources:
                shapes[f"{module}.{companion}"] = (rows, *cols)
    return shapes


def write_random_model(
    family: Family,
    config: Mapping[str, Any],
    directory: Path,
    *,
    shard_bytes: int = 5 * 10**9,
    seed: int = 0,
) -> None:
    """Write config.json and bfloat16 weights (normal, deviation 0.02) of a model.

    Large tensors repeat a pool of four million values from a random place on, so that writing runs
    at disk speed; no two rows are aligned alike.

    Args:
        family: whose names and shapes to use.
        config: the source config.json.
        directory: created if missing.
        shard_bytes: size from which a new shard is begun.
        seed: of the random values.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shapes = source_tensors(family, config)
    shards = list(_sharded(shapes, shard_bytes))
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(_POOL, np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else _SHARD.format(number, len(shards))
        header, entries = encode_header([(name, "BF16", shapes[name]) for name in names])
        with (directory / file).open("wb") as out:
            out.write(header)
            for name, entry in entries.items():
                left = entry.nbytes // 2
                start = int(rng.integers(_POOL))
                while left:
                    block = pool[start : start + left]
                    out.write(block.data)
                    left -= len(block)
                    start = 0
                weight_map[name] = file
    if len(shards) > 1:
        total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2))


def _sharded(shapes: Mapping[str, Shape], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        count = 2 * int(np.prod(shape))
        if names and size + count > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += count
    yield names
