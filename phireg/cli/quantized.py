"""What a finished quantization tells: as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.cli.convert import loss_findings
from phireg.cli.errors import findings_text
from phireg.cli.output import columns, counted, size
from phireg.cli.plan import family_text, warnings_text
from phireg.cli.quality import quality_document, quality_text
from phireg.cli.scales import format_text

if TYPE_CHECKING:
    from phireg.calibration.calibrate import Calibrated
    from phireg.conversion.convert import Converted
    from phireg.planning.model import Plan
    from phireg.quality.result import Quality


@dataclass(frozen=True, slots=True)
class Done:
    """A finished quantization.

    Attributes:
        plan: what was carried out.
        converted: what was written.
        calibrated: the statistics; None if none were needed.
        alpha: SmoothQuant's.
        quality: the report's numbers, if it was measured.
        unmeasured: why it was not, if nobody refused it.
        warned: whether the plan's warnings were told already, before the calibration.
        report: the page, if one was written.
        seconds: by part; ``all`` of them.
    """

    plan: Plan
    converted: Converted
    calibrated: Calibrated | None
    alpha: float
    quality: Quality | None
    unmeasured: str | None
    warned: bool
    report: Path | None
    seconds: dict[str, float]


def done_text(done: Done) -> str:
    """The summary."""
    from phireg.findings import Severity

    plan, files = done.plan, done.converted.files
    others = [name for name in files if not name.endswith(".safetensors")]
    rank_files = counted(plan.options.tp_size, "rank file")
    rows = [
        ("family", family_text(done.plan)),
        ("format", format_text(plan)),
        *_calibration(done.calibrated),
        ("wrote", f"{size(sum(files.values()))} to {done.converted.output_dir}"),
        ("files", f"{rank_files} of {size(max(plan.file_sizes))}"),
        ("", f"{', '.join(others)}"),
        ("time", _time(done.seconds)),
    ]
    if done.report is not None:
        rows.append(("report", str(done.report)))
    if done.unmeasured is not None:
        rows.append(("quality", f"not measured: {done.unmeasured}"))
    untold = [
        finding
        for finding in plan.findings
        if not (done.warned and finding.severity is Severity.WARNING)
    ]
    parts = (
        columns(rows),
        quality_text(done.quality) if done.quality else "",
        warnings_text(done.plan),
        findings_text((*loss_findings(done.converted), *untold)),
    )
    return "\n".join(filter(None, parts))


def _calibration(calibrated: Calibrated | None) -> list[tuple[str, str]]:
    if calibrated is None:
        return []
    from phireg.calibration.run import describe

    told = describe(calibrated.provenance).removeprefix("calibration: ")
    word = "taken from" if calibrated.reused else "kept in"
    return [("scales", told), ("", f"statistics {word} {calibrated.file}")]


def _time(seconds: dict[str, float]) -> str:
    parts = [f"{name} {took:.1f} s" for name, took in seconds.items() if name != "all"]
    return f"{seconds['all']:.1f} s" + (f" ({', '.join(parts)})" if parts else "")


def done_document(done: Done) -> dict[str, Any]:
    """What ``--json`` prints; docs/command-line.md describes it."""
    import dataclasses

    from phireg.planning.report import findings_json

    plan, candidate = done.plan, done.plan.chosen.candidate
    options, calibrated = plan.options, done.calibrated
    losses = sorted(done.converted.losses.items())
    return {
        "output_dir": str(done.converted.output_dir),
        "files": dict(done.converted.files),
        "model_dir": done.plan.model_dir,
        "revision": plan.source.revision,
        "family": plan.family,
        "provided_by": {"distribution": candidate.distribution, "version": candidate.version},
        "dtype": options.dtype,
        "tp_size": options.tp_size,
        "qformat": options.qformat,
        "kv_cache_dtype": options.kv_cache_dtype,
        "alpha": done.alpha if options.scheme and options.scheme.per_channel else None,
        "calibration": calibrated
        and {
            "file": str(calibrated.file),
            "reused": calibrated.reused,
            "provenance": dict(calibrated.provenance),
        },
        "cast_tensors": plan.casts,
        "losses": {name: dataclasses.asdict(loss) for name, loss in losses},
        "plugin_warnings": list(done.plan.chosen.warnings),
        "findings": findings_json(plan.findings),
        "quality": done.quality and quality_document(done.quality),
        "unmeasured": done.unmeasured,
        "report": None if done.report is None else str(done.report),
        "seconds": {name: round(took, 3) for name, took in done.seconds.items()},
    }
