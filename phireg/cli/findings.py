"""Findings of a plan as lines, layers folded."""

from __future__ import annotations

from collections.abc import Iterable

from phireg.cli.text import columns, counted
from phireg.findings import Finding, Severity
from phireg.planning.report import fold


def findings_text(findings: Iterable[Finding], severity: Severity) -> str:
    """The findings of one severity under a heading; empty if there are none."""
    chosen = [finding for finding in findings if finding.severity is severity]
    if not chosen:
        return ""
    rows = []
    for finding, count in fold(chosen):
        subject = f"{finding.subject}: " if finding.subject else ""
        times = f"  ({count} of them)" if count > 1 else ""
        where = f"  [{finding.where}]" if finding.where else ""
        rows.append((finding.code, f"{subject}{finding.detail}{times}{where}"))
    return f"{counted(len(chosen), severity.value)}\n{columns(rows, indent=2)}"


def all_findings_text(findings: Iterable[Finding]) -> str:
    """All findings, the worst first."""
    found = tuple(findings)
    return "\n".join(filter(None, (findings_text(found, severity) for severity in Severity)))
