"""The readers of files that others made, as functions of the bytes of one file.

``READERS`` has them by name: each is called with a directory of its own, prepared once, and with
the bytes. What it may do is return, or raise a PhiregError.
"""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import phireg
from helpers.tiny_phi3 import make_tiny_phi3
from phireg import demo
from phireg.calibration.statistics import Statistics, load, save
from phireg.cli.output import bounded
from phireg.data.rows import read_rows
from phireg.errors import PhiregError
from phireg.files.safetensors import read_header
from phireg.generation.prompts import read_prompts
from phireg.reader.spec import read_spec
from phireg.source.torchbin import list_bin
from phireg.trtllm.engine import read_engine

EXIT_CODES = set(range(2, 9))
"""Those of docs/command-line.md that an error of an input may have."""
LONGEST = 20_000
"""Characters of a message."""


@dataclass(frozen=True)
class Reader:
    """A reader, and the file that it reads."""

    file: str  # below the directory of ``models``
    read: Callable[[Path], object]
    whole: Callable[[bytes, bytes], bytes] = lambda content, good: content
    """Makes the file from the content and the good file."""
    part: Callable[[bytes], bytes] = lambda good: good
    """The content of the good file."""


def with_data(content: bytes, good: bytes) -> bytes:
    """A safetensors file: the data of the good one behind a header in JSON."""
    if not content.startswith(b"{"):
        return content
    data = good[8 + int.from_bytes(good[:8], "little") :]
    return len(content).to_bytes(8, "little") + content + data


def header(good: bytes) -> bytes:
    return good[8 : 8 + int.from_bytes(good[:8], "little")]


def archive(content: bytes, good: bytes) -> bytes:
    """A .bin file with this pickle, and two storages of 64 bytes."""
    if not content.startswith(b"\x80"):
        return content
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", sys.byteorder)
        file.writestr("archive/data/0", bytes(64))
        file.writestr("archive/data/1", bytes(64))
        file.writestr("archive/version", "3\n")
    return out.getvalue()


def pickled(good: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def models(root: Path) -> Path:
    """Make the directories that readers read: ``model``, ``ckpt``, ``engine`` and others."""
    make_tiny_phi3(root / "model")
    phireg.convert(phireg.plan(root / "model"), root / "ckpt")
    config = json.loads((root / "ckpt/config.json").read_text())
    (root / "engine").mkdir()
    build = {"max_batch_size": 1, "max_input_len": 8, "max_seq_len": 16, "max_beam_width": 1}
    engine = {"version": "0.17.0", "pretrained_config": config, "build_config": build}
    (root / "engine/config.json").write_text(json.dumps(engine))
    (root / "engine/rank0.engine").write_bytes(b"engine")
    maxima = {"model.layers.0.mlp.down_proj": np.ones(3, np.float32)}
    save(root / "statistics.safetensors", Statistics(maxima, (1.0,), (1.0,), {"samples": 1}))
    (root / "bin").mkdir()
    tensors = {"a": torch.ones(2, 3, dtype=torch.float16), "b": torch.zeros(4).t()}
    torch.save(tensors, root / "bin/pytorch_model.bin")
    phireg.convert(phireg.plan(demo.find("phi3-small").directory), root / "small")
    (root / "small/phireg.json").unlink()  # which would tell at once
    (root / "rows.jsonl").write_text('{"prompt": "a"}\n{"input_ids": [1, 2]}\n')
    return root


def order(root: Path) -> object:
    """Compare the rows of a Phi-3-small checkpoint with those of the model it was made from."""
    return phireg.row_order(root / "small", model_dir=str(demo.find("phi3-small").directory))


def read_jsonl(root: Path) -> None:
    path = root / "rows.jsonl"
    for read in (read_rows, lambda path: read_prompts(str(path), path.read_bytes())):
        try:
            read(path)
        except PhiregError as error:
            assert error.exit_code in EXIT_CODES


def read_config(root: Path) -> None:
    inspection = phireg.inspect(root / "ckpt")
    json.dumps(bounded({"config": inspection.config, "problems": inspection.problems}))
    read_spec(root / "ckpt")


SHARD = "model/model-00001-of-00003.safetensors"
STATISTICS = "statistics.safetensors"

READERS = {
    "headers": Reader(SHARD, lambda root: read_header(root / SHARD), with_data, header),
    "indices": Reader(
        "model/model.safetensors.index.json", lambda root: phireg.plan(root / "model")
    ),
    "configs": Reader("model/config.json", lambda root: phireg.plan(root / "model")),
    "checkpoints": Reader("ckpt/config.json", read_config),
    "manifests": Reader("ckpt/phireg.json", lambda root: phireg.inspect(root / "ckpt", check=True)),
    "engines": Reader("engine/config.json", lambda root: read_engine(root / "engine")),
    "statistics": Reader(STATISTICS, lambda root: load(root / STATISTICS), with_data, header),
    "postprocess": Reader("small/rank0.safetensors", order, with_data, header),
    "postprocess-config": Reader("small/config.json", order),
    "archives": Reader(
        "bin/pytorch_model.bin",
        lambda root: list_bin(root / "bin", "pytorch_model.bin"),
        archive,
        pickled,
    ),
    "rows": Reader("rows.jsonl", read_jsonl),
}


def planted(root: Path) -> None:
    with suppress(ValueError, AttributeError):
        build = json.loads((root / "engine/config.json").read_bytes()).get("build_config", {})
        if type(build.get("max_seq_len")) is int and build["max_seq_len"] != 16:
            raise KeyError("planted")


PLANTED = Reader("engine/config.json", planted)
"""Not among the others: it is broken, and the fuzzer must find that."""


class BrokenError(AssertionError):
    """A reader did what it may not."""


def check(reader: Reader, root: Path, good: bytes, content: bytes) -> bool:
    """Give a reader this content; return whether it takes it, or raise BrokenError."""
    (root / reader.file).write_bytes(reader.whole(content, good))
    before = sorted(map(str, root.rglob("*")))
    streams, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), io.StringIO(), io.StringIO()
    taken = True
    try:
        reader.read(root)
    except PhiregError as error:
        taken = False
        if error.exit_code not in EXIT_CODES:
            raise BrokenError(f"exit code {error.exit_code}") from error
        if len(str(error)) > LONGEST:
            raise BrokenError(f"a message of {len(str(error))} characters") from error
    finally:
        printed = sys.stdout.getvalue() + sys.stderr.getvalue()
        sys.stdout, sys.stderr = streams
    if printed:
        raise BrokenError(f"it printed {printed[:200]!r}")
    if sorted(map(str, root.rglob("*"))) != before:
        raise BrokenError("it left or removed a file")
    return taken
