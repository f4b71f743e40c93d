"""What the scales of a plan will be computed from."""

from __future__ import annotations

from phireg.planning.model import Plan

CALIBRATION, WEIGHTS = "calibration", "weights"


def computed_from(plan: Plan, scale: str) -> tuple[str, ...]:
    """The origins of one of the plan's scales, with SmoothQuant's alpha at 1.

    With a smaller one all scales of its linears depend on the weights as well.

    Args:
        plan: a plan that has the scale.
        scale: its name in ``plan.scales``.
    """
    if scale.rpartition(".")[2] != "weights_scaling_factor":
        return (CALIBRATION,)
    scheme = plan.options.scheme
    smoothed = scheme is not None and "prequant_scaling_factor" in scheme.companions
    return (CALIBRATION, WEIGHTS) if smoothed else (WEIGHTS,)
