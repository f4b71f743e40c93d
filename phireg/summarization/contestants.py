"""Which backends run what, and whether they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phireg.errors import UsageError
from phireg.generation.backend import Options, describe, process_rank
from phireg.summarization.task import Sample, Settings

EXECUTOR, ENGINE, HF = "executor", "tensorrt-llm", "hf"


@dataclass(frozen=True, slots=True)
class Contestant:
    """A backend and what it is to run.

    Attributes:
        name: the backend's name.
        place: the directory.
        options: how to compute.
    """

    name: str
    place: Path
    options: Options


@dataclass(frozen=True, slots=True)
class Places:
    """The directories of a run.

    Attributes:
        checkpoint: for the executor.
        engine: for TensorRT-LLM.
        hf: the source model.
    """

    checkpoint: Path | None = None
    engine: Path | None = None
    hf: Path | None = None

    def given(self) -> tuple[Path, ...]:
        """Those there are."""
        return tuple(p for p in (self.checkpoint, self.engine, self.hf) if p is not None)


def choose(
    names: Sequence[str], places: Places, options: Options, hf_dtype: str | None
) -> tuple[Contestant, ...]:
    """The backends by name, each with its directory.

    Args:
        names: in order; a name given twice counts once.
        places: the directories.
        options: of the executor. The others share its device; an engine has its own dtype.
        hf_dtype: of the source model.

    Raises:
        UsageError: a backend's directory is missing, or there is no such backend.
    """
    chosen = []
    for name in dict.fromkeys(names):
        if name == HF:
            place, own = places.hf, replace(options, dtype=hf_dtype, offload=None)
            advice = "give --hf-model-dir the source model."
        elif name == ENGINE:
            place, own = places.engine, replace(options, dtype=None, offload=None)
            advice = "give --engine-dir the engine; phireg build makes one of a checkpoint."
        else:
            place, own = places.checkpoint, options
            advice = "give the checkpoint as the argument."
        if place is None:
            raise UsageError(f"there is nothing to run with backend '{name}'", hint=advice)
        chosen.append(Contestant(name, place, own))
    return tuple(chosen)


def check_processes(contestants: Sequence[Contestant]) -> None:
    """Refuse a number of processes that the backends cannot use; hf runs in the first one alone.

    Raises:
        UsageError: says how many can.
    """
    for one in contestants:
        processes = process_rank(one.name)[1]
        description = describe(one.name, one.place, one.options)
        alone = one.name == HF and len(contestants) > 1
        if processes not in description.processes and not alone:
            ranks = description.tp_size
            raise UsageError(
                f"{processes} processes were started, but {one.place} was made for {ranks} rank(s)",
                hint=f"start {' or '.join(map(str, description.processes))}.",
            )


def check_fits(one: Contestant, samples: Sequence[Sample], settings: Settings) -> None:
    """Refuse what a model cannot take before its weights are read.

    Raises:
        UsageError: says what to lower.
        PhiregError: the backend cannot run its directory.
    """
    description = describe(one.name, one.place, one.options)
    who = f"{one.name} ({one.place})"
    beams, batch = description.max_beams, description.max_batch
    if beams is not None and settings.num_beams > beams:
        raise UsageError(
            f"{who}: {settings.num_beams} beams, and it can do {beams}",
            hint=f"use --num-beams {beams}, or leave the backend out.",
        )
    if batch is not None and settings.batch_size > batch:
        raise UsageError(
            f"{who}: batches of {settings.batch_size}, and it takes {batch}",
            hint=f"use --batch-size {batch}.",
        )
    longest = max(samples, key=lambda sample: len(sample.prompt))
    room = description.positions - settings.output_len
    if description.max_input is not None:
        room = min(room, description.max_input)
    if len(longest.prompt) > room:
        raise UsageError(
            f"{who}: {longest.where} has {len(longest.prompt)} tokens; with {settings.output_len} "
            f"new ones the model has room for {max(0, room)}",
            hint=f"use --max-input-length {room}."
            if room > 1
            else "lower --output-len and --max-input-length.",
        )
    for sample in samples:
        wrong = next((t for t in sample.prompt if not 0 <= t < description.vocab_size), None)
        if wrong is not None:
            raise UsageError(
                f"{who}: {sample.where}: token {wrong} is outside the model's vocabulary of "
                f"{description.vocab_size}",
                hint="is this the model's own tokenizer? Give --tokenizer-dir another.",
            )


def following(contestants: Sequence[Contestant]) -> tuple[Contestant, ...]:
    """The backends that this process runs as another rank than 0."""
    return tuple(one for one in contestants if one.name != HF and process_rank(one.name)[0] > 0)


def led(one: Contestant) -> bool:
    """Whether other processes wait for this one to open the backend."""
    return one.name != HF and process_rank(one.name)[1] > 1
