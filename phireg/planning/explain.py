"""Which source rows an output is made of."""

from __future__ import annotations

import difflib

from phireg.errors import PlanError, UsageError
from phireg.planning.model import Output, Plan
from phireg.planning.report import problems


def explain(plan: Plan, tensor: str) -> tuple[Output, ...]:
    """The outputs a name stands for: a tensor of every rank, or all tensors of a module.

    Raises:
        PlanError: the plan has errors.
        UsageError: no output has that name.
    """
    if plan.errors:
        raise PlanError(f"the plan has problems\n{problems(plan.errors)}")
    outputs = tuple(o for o in plan.outputs if o.name == tensor or o.name.startswith(f"{tensor}."))
    if not outputs:
        names = sorted({o.name for o in plan.outputs})
        near = difflib.get_close_matches(tensor, names, 3, 0.5)
        raise UsageError(
            f"the checkpoint has no tensor or module '{tensor}'",
            hint=f"perhaps {' or '.join(near)}."
            if near
            else "phireg plan --json lists all of them.",
        )
    return outputs
