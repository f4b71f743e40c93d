"""A plan for people and programs: folded findings, the plan as JSON, the origin of a tensor."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from phireg.errors import PlanError, UsageError
from phireg.findings import Finding
from phireg.layout.spans import Span
from phireg.planning.model import Output, Plan, Rows

_MOST_ROWS = 50
_LAYER = re.compile(r"\b([A-Za-z_]\w*)\.(0|[1-9]\d*)\.")
"""The layer number in a tensor or module name (``layers.0.``): its first number between dots."""


def fold_layers(items: Iterable[tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[int]]]:
    """Fold tuples of texts that differ in their layer number only; with the indices of each group.

    ``model.layers.0.x`` and ``model.layers.1.x`` become ``model.layers.{0..1}.x``. The layer number
    is that of the first text that has one.
    """
    groups: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
    for index, texts in enumerate(items):
        match = next(filter(None, map(_LAYER.search, texts)), None)
        generic = texts
        if match:
            generic = tuple(text.replace(match[0], f"{match[1]}.{{}}.") for text in texts)
        layers, indices = groups.setdefault(generic, ([], []))
        indices.append(index)
        if match:
            layers.append(int(match[2]))
    return [
        (tuple(text.replace("{}", ranges(layers)) for text in texts) if layers else texts, indices)
        for texts, (layers, indices) in groups.items()
    ]


def fold(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """Fold findings that differ in their layer only; with the number of each group."""
    findings = list(findings)
    texts = [(f.subject, f.detail, f.severity.value, f.code, f.where) for f in findings]
    return [
        (replace(findings[indices[0]], subject=subject, detail=detail), len(indices))
        for (subject, detail, *_), indices in fold_layers(texts)
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


def finding_texts(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Code and text of findings, layers folded."""
    rows = []
    for finding, count in fold(findings):
        subject = f"{finding.subject}: " if finding.subject else ""
        times = f"  ({count} of them)" if count > 1 else ""
        where = f"  [{finding.where}]" if finding.where else ""
        rows.append((finding.code, f"{subject}{finding.detail}{times}{where}"))
    if len(rows) > _MOST_ROWS:
        rows[_MOST_ROWS:] = [("", f"and {len(rows) - _MOST_ROWS} more")]
    return rows


def problems(findings: Iterable[Finding]) -> str:
    """Findings as lines of an error message."""
    return "\n".join(f"  {code:9} {text}" for code, text in finding_texts(findings))


def explain(plan: Plan, tensor: str) -> tuple[Output, ...]:
    """The outputs of a name: a tensor of every rank, or all tensors of a module.

    Raises:
        PlanError: the plan has errors.
        UsageError: no output has that name.
    """
    if plan.errors:
        raise PlanError(f"the plan has problems\n{problems(plan.errors)}", hint=plan.advice)
    outputs = tuple(o for o in plan.outputs if o.name == tensor or o.name.startswith(f"{tensor}."))
    if not outputs:
        names = sorted({o.name for o in plan.outputs})
        near = " or ".join(difflib.get_close_matches(tensor, names, 3, 0.5))
        raise UsageError(
            f"the checkpoint has no tensor or module '{tensor}'",
            hint=f"perhaps {near}." if near else "phireg plan --json lists all of them.",
        )
    return outputs


def as_json(plan: Plan, *, workers: int) -> dict[str, Any]:
    """The whole plan: totals, findings, and every source byte range with its target."""
    return {
        "family": plan.family,
        "tp_sizes": list(plan.tp_sizes),
        **plan.options.as_json(),
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
        "linears": [{"target": x.target, "sources": list(x.sources)} for x in plan.linears],
        "kv_caches": list(plan.kv_caches),
        "config": plan.config,
        "findings": findings_json(plan.findings),
        "outputs": [output_json(plan, output) for output in plan.outputs],
    }


def findings_json(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Findings one by one."""
    return [asdict(finding) | {"severity": finding.severity.value} for finding in findings]


def output_json(plan: Plan, output: Output) -> dict[str, Any]:
    """One output tensor with the source ranges that it is made of."""
    return {
        "file": plan.files[output.rank],
        "tensor": output.name,
        "dtype": output.dtype,
        "shape": list(output.shape),
        "offset": output.offset,
        "bytes": output.nbytes,
        "rows": list(_spans_json(plan, output)),
    }


def _spans_json(plan: Plan, output: Output) -> Iterator[Mapping[str, Any]]:
    position = 0
    for span in output.origin.spans:
        source = None
        if span.source is not None:
            source = {"tensor": span.source, "rows": [span.start, span.stop]}
            source |= _place_json(plan, output, span, span.source)
        yield {"rows": [position, position + span.count], "from": source}
        position += span.count


def _place_json(plan: Plan, output: Output, span: Span, name: str) -> dict[str, Any]:
    if not isinstance(output.origin, Rows):
        basis = [basis.value for basis in plan.scales[name].computed_from]
        return {"file": None, "bytes": None, "columns": [], "computed_from": basis}
    tensor = plan.source.tensors[name]
    per_row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
    bounds = (span.start, span.stop)
    columns = [[kept.start, kept.stop] for kept in output.origin.columns or ()]
    return {
        "file": tensor.file,
        "bytes": None if tensor.strides else [tensor.offset + row * per_row for row in bounds],
        "columns": columns or [[0, size] for size in tensor.shape[1:]],
        "computed_from": None,
    }
