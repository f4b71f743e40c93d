"""A plan for people and programs: findings with layers folded, and the plan as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from phireg.findings import Finding
from phireg.layout.spans import Span
from phireg.planning.model import Output, Plan, output_bytes
from phireg.planning.origins import computed_from

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=^layers\.)\d+(?=\.)")
"""The layer number in a tensor or module name, its first number between dots."""


def fold(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """Findings that differ in their layer only become one, with their number.

    ``model.layers.0.x`` and ``model.layers.1.x`` are ``model.layers.{0..1}.x``.
    """
    groups: dict[tuple[Any, ...], tuple[Finding, list[int]]] = {}
    for finding in findings:
        match = _LAYER.search(finding.subject) or _LAYER.search(finding.detail)
        if match is None:
            groups.setdefault((finding, "whole"), (finding, []))
            continue
        number = match.group()
        subject = _LAYER.sub("{}", finding.subject, count=1)
        detail = re.sub(rf"\.{number}\.", ".{}.", finding.detail)
        generic = replace(finding, subject=subject, detail=detail)
        groups.setdefault((generic,), (generic, []))[1].append(int(number))
    folded = []
    for finding, numbers in groups.values():
        if numbers:
            layers = ranges(numbers)
            finding = replace(
                finding,
                subject=finding.subject.replace("{}", layers),
                detail=finding.detail.replace("{}", layers),
            )
        folded.append((finding, max(1, len(numbers))))
    return folded


def fold_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ in their layer only become one, with their number."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = _LAYER.search(name)
        generic = name if match is None else _LAYER.sub("{}", name, count=1)
        groups.setdefault(generic, []).extend([int(match.group())] if match else [])
    return [
        (generic.replace("{}", ranges(numbers)) if numbers else generic, max(1, len(numbers)))
        for generic, numbers in groups.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ``{0..3,5}``; a single one as itself."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return str(runs[0][0])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


def problems(findings: Iterable[Finding]) -> str:
    """Findings as lines of an error message."""
    lines = []
    for finding, count in fold(findings):
        times = f"  ({count} of them)" if count > 1 else ""
        where = f"  [{finding.where}]" if finding.where else ""
        lines.append(f"  {finding.code:9} {finding.subject}: {finding.detail}{times}{where}")
    return "\n".join(lines)


def as_json(plan: Plan, *, workers: int) -> dict[str, Any]:
    """The whole plan: totals, findings, and every source byte range with its target."""
    return {
        "family": plan.family,
        "dtype": plan.options.dtype,
        "tp_size": plan.options.tp_size,
        "moe_ep_size": plan.options.ranks.moe_ep_size,
        "weight_only": plan.options.weight_only,
        "qformat": plan.options.qformat,
        "kv_cache_dtype": plan.options.kv_cache_dtype,
        "source": {
            "directory": str(plan.source.directory),
            "revision": plan.source.revision,
            "files": [f.name for f in plan.source.files],
            "tensors": len(plan.source.tensors),
        },
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "buffer_bytes": plan.buffer_bytes(workers),
        "cast_tensors": plan.casts,
        "calibrated": plan.options.calibrated,
        "linears": [
            {"target": linear.target, "sources": list(linear.sources)} for linear in plan.linears
        ],
        "kv_caches": list(plan.kv_caches),
        "config": plan.config,
        "findings": findings_json(plan.findings),
        "outputs": [output_json(plan, output) for output in plan.outputs],
    }


def findings_json(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Findings one by one, as they are."""
    return [
        {
            "severity": finding.severity.value,
            "code": finding.code,
            "subject": finding.subject,
            "detail": finding.detail,
            "where": finding.where,
        }
        for finding in findings
    ]


def output_json(plan: Plan, output: Output) -> dict[str, Any]:
    """One output tensor with the source ranges it is made of."""
    return {
        "file": f"rank{output.rank}.safetensors",
        "tensor": output.name,
        "dtype": output.dtype,
        "shape": list(output.shape),
        "offset": output.offset,
        "bytes": output_bytes(output),
        "rows": list(_placed(plan, output)),
    }


def _placed(plan: Plan, output: Output) -> Iterable[Mapping[str, Any]]:
    position = 0
    for span in output.rows:
        entry: dict[str, Any] = {"rows": [position, position + span.count], "from": None}
        if span.source is not None:
            tensor = plan.tensor(span.source)
            per_row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
            computed = span.source in plan.scales
            entry["from"] = {
                "file": None if computed else tensor.file,
                "tensor": tensor.name,
                "rows": [span.start, span.stop],
                "bytes": None
                if computed
                else [tensor.offset + n * per_row for n in (span.start, span.stop)],
                "columns": _columns(output.columns, tensor.shape),
                "computed_from": list(computed_from(plan, span.source)) if computed else None,
            }
        yield entry
        position += span.count


def _columns(columns: tuple[Span, ...] | None, shape: tuple[int, ...]) -> list[list[int]]:
    if len(shape) < 2:
        return []
    return [[s.start, s.stop] for s in columns] if columns else [[0, shape[1]]]
