"""The command that mends what was found, where there is one."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable

from phireg.errors import PhiregError
from phireg.postprocessing.postprocess import row_order
from phireg.registry import AUTO
from phireg.verification.patterns import REGROUP
from phireg.verification.request import Request
from phireg.verification.result import Problem


def with_commands(problems: Iterable[Problem], request: Request) -> list[Problem]:
    """Problems of rows that ``phireg postprocess`` puts right, with its command line as hint.

    It is suggested only where it would do so: not if some rows are right already, or if phireg
    itself wrote them.
    """
    found = list(problems)
    if all(problem.hint != REGROUP for problem in found):
        return found
    try:
        needed = row_order(
            request.checkpoint_dir,
            model_dir=request.model_dir,
            family=request.family,
            revision=request.revision,
        ).needed
    except PhiregError:
        needed = False
    mends = f"mend it: {_command(request)}" if needed else "convert or quantize again."
    return [
        dataclasses.replace(problem, hint=f"{REGROUP}; {mends}")
        if problem.hint == REGROUP
        else problem
        for problem in found
    ]


def _command(request: Request) -> str:
    words = ["phireg", "postprocess", str(request.checkpoint_dir), "--model-dir", request.model_dir]
    if request.family != AUTO:
        words += ["--family", request.family]
    if request.revision is not None:
        words += ["--revision", request.revision]
    return shlex.join(words)
