"""Writing a checkpoint: the output directory, the files of the ranks, the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.checkpoint.manifest import file_record, rank_file_record, write_manifest
from phireg.conversion.card import card_of, check_card
from phireg.conversion.cast import Loss
from phireg.conversion.stream import Progress, Streamed, stream
from phireg.errors import PlanError, UsageError
from phireg.files.kinds import CHECKPOINT, QUANTIZED_MODEL, file_sizes, producer, tokenizer_files
from phireg.files.output import OutputDirectory
from phireg.files.regular import bullets
from phireg.files.writing import copy_file
from phireg.findings import Finding
from phireg.planning.model import Plan
from phireg.planning.report import fold_layers, problems
from phireg.targets.card import CARD

if TYPE_CHECKING:
    from phireg.calibration.calibrate import Calibrated
    from phireg.conversion.quantizer import WeightQuantizer


@dataclass(frozen=True, slots=True)
class Converted:
    """A finished conversion.

    Attributes:
        output_dir: the checkpoint.
        files: every file written, with its size in bytes.
        losses: values that became infinite or zero in a cast, were cut off when quantized, or were
            NaN or infinite in the source, by source tensor.
        calibrated: statistics that were taken or read for it.
        quantization: the manifest's record of the scales.
        findings: warnings about the scales.
    """

    output_dir: Path
    files: Mapping[str, int]
    losses: Mapping[str, Loss]
    calibrated: Calibrated | None = None
    quantization: Mapping[str, Any] | None = None
    findings: tuple[Finding, ...] = ()


def convert(
    plan: Plan,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    allow_overflow: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Carry out a plan. The output appears under its name complete, or not at all.

    Args:
        plan: from :func:`phireg.plan`.
        output_dir: the checkpoint to make; must not exist, or be empty.
        overwrite: replace it once the new one is complete, if it is recognizably a checkpoint.
        allow_overflow: let finite values become infinite in a cast.
        progress: takes (further bytes written, all of them); called from worker threads.

    Raises:
        UsageError: the plan needs calibration; see :func:`quantize`.
        PlanError: the plan has errors, or a cast overflowed.
        SourceError: a source file changed or could not be read.
        OutputError: the output exists, or cannot be written.
    """
    if plan.scales:
        raise UsageError(
            "this plan quantizes weights, inputs or a KV cache",
            hint="phireg quantize computes their scales, from sample texts where that is needed.",
        )
    total = plan.tensor_bytes
    return write_checkpoint(
        plan,
        Path(output_dir),
        overwrite=overwrite,
        allow_overflow=allow_overflow,
        progress=None if progress is None else lambda more: progress(more, total),
    )


def check_plan(plan: Plan) -> None:
    """Raise a PlanError with all errors of a plan, if it has any."""
    if plan.errors:
        raise PlanError(
            f"the plan has {len(plan.errors)} problem{'s' if len(plan.errors) > 1 else ''}; "
            f"nothing was written\n{problems(plan.errors)}",
            hint=plan.advice,
        )


def write_checkpoint(
    plan: Plan,
    target: Path,
    *,
    overwrite: bool,
    allow_overflow: bool,
    progress: Progress | None,
    quantizer: Callable[[], WeightQuantizer] | None = None,
    quantization: Mapping[str, Any] | None = None,
    demo: bool = False,
) -> Converted:
    """Write all files of a checkpoint; see :func:`convert`.

    ``quantizer`` is called when the output is known to be usable, before anything is written;
    ``quantization`` is the manifest's record of the scales; ``demo`` is recorded, too.
    """
    check_plan(plan)
    carried = tokenizer_files(plan.source.directory)
    size = plan.bytes_out + sum(file.stat().st_size for file in carried)
    kind = CHECKPOINT if plan.target.by_rank else QUANTIZED_MODEL
    if overwrite and not plan.target.by_rank:
        check_card(target)
    with OutputDirectory(target, overwrite=overwrite, required_bytes=size, kind=kind) as directory:
        scales = quantizer() if quantizer else None
        streamed = stream(plan, directory, progress=progress, quantizer=scales)
        if not allow_overflow:
            _check_overflow(streamed, plan)
        for file in carried:
            copy_file(file, directory)
        for name, document in plan.documents.items():
            text = json.dumps(document, indent=4) + "\n"
            (directory / name).write_text(text, encoding="utf-8")
        manifest = manifest_of(plan, directory, streamed)
        manifest["source"]["values"] = plan.source.digest()
        if quantization is not None:
            manifest["quantization"] = quantization
        write_manifest(directory, manifest | ({"demo": True} if demo else {}))
        if not plan.target.by_rank:
            # Not in the manifest: it is its owner's to extend.
            card = card_of(plan, quantization).encode("utf-8", "surrogateescape")
            (directory / CARD).write_bytes(card)
        files = file_sizes(directory)
    findings = scales.findings if scales else ()
    losses = streamed.losses
    return Converted(target, files, losses, quantization=quantization, findings=findings)


def _check_overflow(streamed: Streamed, plan: Plan) -> None:
    lost = {name: loss.overflowed for name, loss in streamed.losses.items() if loss.overflowed}
    if lost:
        counts = list(lost.values())
        folded = fold_layers((name,) for name in lost)
        lines = [f"{name}: {sum(counts[i] for i in own)} values" for (name,), own in folded]
        raise PlanError(
            f"{sum(counts)} finite values do not fit into {plan.options.dtype}; "
            f"nothing was written{bullets(lines, 50)}",
            hint="choose another --dtype, or --allow-overflow to write them as infinite.",
        )


def manifest_of(plan: Plan, directory: Path, streamed: Streamed) -> dict[str, Any]:
    """Describe a plan and everything that was written into ``directory`` for it."""
    candidate = plan.chosen.candidate
    ranks: dict[str, Any] = {}
    files = zip(plan.files, plan.headers, plan.file_sizes, strict=True)
    for number, (file, header, size) in enumerate(files):
        tensors = {name: d for (n, name), d in streamed.digests.items() if n == number}
        ranks[file] = rank_file_record(header, size, tensors)
    others = {
        file.name: file_record(file)
        for file in sorted(directory.iterdir())
        if file.name not in ranks
    }
    return {
        "producer": producer(),
        "family": {
            "name": plan.family,
            "distribution": candidate.distribution,
            "version": candidate.version,
        },
        "options": plan.options.as_json(),
        "source": {
            "model_dir": plan.model_dir,
            "revision": plan.source.revision,
            "files": [
                {"name": f.name, "size": f.size, "header": f.header_digest}
                for f in plan.source.files
            ],
        },
        "files": {**others, **ranks},
    }
