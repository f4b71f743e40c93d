"""The directory of an engine that phireg built itself.

``config.json`` has ``pretrained_config``, the checkpoint's config, and ``build_config``, the limits
of the engine, as TensorRT-LLM's engines do, and besides them ``backend`` and ``version``. For every
rank there is a ``rank{r}.engine``. ``phireg-build.json`` says what it was made from and of what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phireg.errors import CheckError, SourceError
from phireg.files.json import read_json_object
from phireg.files.kinds import BUILD_FILE, CHECKPOINT, ENGINE, kind_of, kind_of_config
from phireg.reader.config import Config
from phireg.reader.spec import ModelSpec, parse_spec, read_spec
from phireg.tensorrt.package import NAMES, Backend
from phireg.tensorrt.requirements import WeightsForm


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine takes at most; lengths are in tokens."""

    max_batch_size: int
    max_input_len: int  # of a prompt
    max_seq_len: int  # of prompt and continuation: the slots of the caches
    max_chunk_len: int  # of one step: longer prompts come in several


@dataclass(frozen=True, slots=True)
class NativeEngine:
    """An engine of TensorRT or TensorRT for RTX."""

    directory: Path
    backend: Backend
    version: str  # of the package that built it and can run it
    gpus: tuple[str, ...]  # compute capabilities it was built for ("sm89"); empty: the builder's
    weights: WeightsForm
    limits: Limits
    config: Mapping[str, Any]  # the checkpoint's config.json
    spec: ModelSpec

    def path(self, rank: int) -> Path:
        """Return a rank's engine file."""
        return self.directory / f"rank{rank}.engine"

    @property
    def manifest(self) -> dict[str, Any]:
        """Return what ``phireg-build.json`` says."""
        return read_json_object(self.directory / BUILD_FILE)

    def records(self) -> list[dict[str, Any]]:
        """Return what the manifest says of each rank's engine: its bytes, digest and network."""
        records = self.manifest.get("ranks")
        kinds = {"bytes": int, "digest": str, "inputs": list, "outputs": list, "layers": dict}
        if not isinstance(records, list) or len(records) != self.spec.tp_size:
            raise SourceError(f"{self.directory / BUILD_FILE} does not describe each rank's engine")
        for record in records:
            for key, kind in kinds.items():
                value = record.get(key) if isinstance(record, dict) else None
                tensors = value if isinstance(value, list) else []
                if not isinstance(value, kind) or not all(isinstance(t, dict) for t in tensors):
                    raise SourceError(f"{self.directory / BUILD_FILE}: a rank has no {key}")
        return records

    @property
    def checkpoint_dir(self) -> Path | None:
        """Return where the checkpoint was when the engine was built; None for no checkpoint."""
        directory = Config(self.manifest, BUILD_FILE).block("checkpoint").values.get("directory")
        return Path(directory) if isinstance(directory, str) else None


def checkpoint_of(engine: NativeEngine, named: Path | None, option: str) -> Path:
    """Return the checkpoint that an engine was built from, or one of its shape that is named."""
    directory = engine.checkpoint_dir if named is None else named
    if directory is None:
        raise SourceError(
            f"{engine.directory} was built without a checkpoint",
            hint=f"name one of the same shape: {option} CKPT.",
        )
    if kind_of(directory) is not CHECKPOINT:
        raise SourceError(
            f"{directory}, of which {engine.directory} was built, is not a checkpoint"
            + ("" if named else " any more"),
            hint=f"name it where it is now: {option} CKPT.",
        )
    if read_spec(directory) != engine.spec:
        raise CheckError(
            f"{directory} is not what {engine.directory} was built from: their config.json differ",
            hint="build the engine again, or name its own checkpoint.",
        )
    return directory


def is_native(directory: str | Path) -> bool:
    """Return whether a directory holds an engine that phireg built itself."""
    try:
        config = read_json_object(Path(directory) / "config.json")
    except SourceError:
        return False
    return kind_of_config(config) is ENGINE and config.get("backend") in NAMES


def read_native(directory: str | Path) -> NativeEngine:
    """Read such an engine's config and look for its rank files; raise what is wrong with them."""
    directory = Path(directory)
    path = directory / "config.json"
    config = Config(read_json_object(path), str(path))
    if not is_native(directory):
        raise SourceError(
            f"{directory} is not an engine of TensorRT or TensorRT for RTX",
            hint="phireg build --backend tensorrt-rtx makes one from a checkpoint.",
        )
    pretrained, build = config.block("pretrained_config"), config.block("build_config")
    spec = parse_spec(pretrained.values, pretrained.where)
    for rank in range(spec.tp_size):
        if not (directory / f"rank{rank}.engine").is_file():
            raise SourceError(
                f"{directory} has no rank{rank}.engine; it is made for {spec.tp_size}"
            )
    gpus, form = build.values.get("gpus"), build.values.get("weights")
    if not isinstance(gpus, list) or not all(isinstance(gpu, str) for gpu in gpus):
        raise build.error(f"gpus is {gpus!r}, not a list of compute capabilities")
    if form not in ("embedded", "separate"):
        raise build.error(f"weights is {form!r}, not embedded or separate")
    backend: Backend = "tensorrt" if config.text("backend") == "tensorrt" else "tensorrt-rtx"
    limits = Limits(**{name: build.integer(name) for name in Limits.__dataclass_fields__})
    return NativeEngine(
        directory, backend, config.text("version"), tuple(gpus), form, limits, pretrained.values,
        spec,
    )  # fmt: skip


def write_config(
    directory: Path,
    backend: Backend,
    version: str,
    gpus: tuple[str, ...],
    form: WeightsForm,
    limits: Limits,
    config: Mapping[str, Any],
) -> None:
    """Write ``config.json`` of an engine."""
    document = {
        "backend": backend,
        "version": version,
        "pretrained_config": dict(config),
        "build_config": {**asdict(limits), "gpus": list(gpus), "weights": form},
    }
    path = directory / "config.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
