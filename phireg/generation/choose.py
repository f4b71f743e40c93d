"""Which backend runs a directory, and what to do about one that it cannot run."""

from __future__ import annotations

import os
from pathlib import Path

from phireg.errors import CheckError, SourceError, UsageError
from phireg.trtllm.engine import is_engine_dir
from phireg.trtllm.mpi import process_rank as mpi_rank

CHECKPOINT, ENGINE, MODEL = "checkpoint", "engine", "Hugging Face model"
_NAMES = {
    CHECKPOINT: "a TensorRT-LLM checkpoint",
    ENGINE: "a built engine",
    MODEL: "a Hugging Face model",
}
_RUNS = {"executor": CHECKPOINT, "tensorrt-llm": ENGINE, "hf": MODEL}


def kind_of(place: Path) -> str:
    """What a directory is, by its config.json: a checkpoint unless it is something else.

    Raises:
        UsageError: there is no such directory.
    """
    from phireg.files.json import read_json_object

    if not place.is_dir():
        raise UsageError(
            f"no such directory: {place}",
            hint="give a checkpoint (phireg convert and phireg quantize write them), an engine, or "
            "with --backend hf a source model.",
        )
    if is_engine_dir(place) or any(place.glob("rank*.engine")):
        return ENGINE
    try:
        config = read_json_object(place / "config.json")
    except SourceError:
        return CHECKPOINT  # whoever opens it says what is wrong
    named = "architectures" in config or "model_type" in config
    return MODEL if named and "architecture" not in config else CHECKPOINT


def default_backend(place: Path) -> str:
    """The backend for a directory; an engine is for TensorRT-LLM, all else for the executor."""
    return "tensorrt-llm" if kind_of(place) == ENGINE else "executor"


def check_kind(backend: str, place: Path) -> None:
    """Refuse a directory that is meant for another backend.

    Raises:
        CheckError: says what it is and what to do.
        UsageError: there is no such directory.
    """
    wanted = _RUNS.get(backend)
    if wanted is None:
        return  # a backend from elsewhere knows itself
    found = kind_of(place) if place.is_dir() or wanted != MODEL else MODEL  # or on the hub
    if found == wanted:
        return
    if found == CHECKPOINT and not (place / "config.json").exists():
        raise CheckError(
            f"{place} is not {_NAMES[wanted]}: it holds no config.json",
            hint=f"give {_NAMES[wanted]}, which is what backend {backend} runs.",
        )
    convert = f"phireg convert --model-dir {place} --output-dir CKPT"
    hints = {
        (CHECKPOINT, ENGINE): "give the checkpoint that it was built from, or use --backend "
        "tensorrt-llm.",
        (CHECKPOINT, MODEL): f"convert it first: {convert}; or run it as it is: --backend hf",
        (ENGINE, CHECKPOINT): f"build one of it: phireg build {place} --output-dir ENGINE; or use "
        "--backend executor.",
        (ENGINE, MODEL): f"convert it first: {convert}; then phireg build makes an engine.",
        (MODEL, CHECKPOINT): "give the directory that it was converted from, or use --backend "
        "executor.",
        (MODEL, ENGINE): "give the directory that it was made from, or use --backend tensorrt-llm.",
    }
    raise CheckError(
        f"{place} is {_NAMES[found]}, not {_NAMES[wanted]}, which backend {backend} runs",
        hint=hints[wanted, found],
    )


def check_starter(backend: str) -> tuple[int, str]:
    """Tell processes that were started by what the backend does not use.

    Without this each of them would take itself for the only one.

    Returns:
        The rank, and what is wrong: nothing if it is empty.
    """
    torchrun = os.environ.get("WORLD_SIZE", "1") != "1"
    rank, size = mpi_rank()
    if backend == "tensorrt-llm" and torchrun and size == 1:
        wrong = "started by torchrun; ranks of an engine are started by mpirun"
        return int(os.environ.get("RANK", "0") or 0), wrong
    if backend != "tensorrt-llm" and size > 1 and not torchrun:
        return rank, f"started by mpirun; backend {backend} does not use it"
    return 0, ""
