"""Convert Microsoft's Phi models to TensorRT-LLM checkpoints, quantize, verify and run them.

The functions of the command line are here, imported on first use:

>>> import phireg
>>> plan = phireg.plan("./Phi-3-small-8k-instruct", tp_size=2)  # doctest: +SKIP
>>> phireg.convert(plan, "./ckpt")  # doctest: +SKIP

They raise subclasses of :class:`phireg.errors.PhiregError` for bad input. Plugins import
:mod:`phireg.api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phireg.calibration.calibrate import Calibrated, calibrate, statistics_beside
    from phireg.checkpoint.inspect import Inspection, inspect
    from phireg.conversion.convert import Converted, convert
    from phireg.conversion.quantization import quantize, quantize_bytes
    from phireg.errors import PhiregError
    from phireg.planning.explain import explain
    from phireg.planning.model import Plan
    from phireg.planning.plan import plan
    from phireg.postprocessing.postprocess import (
        Postprocessed,
        RowOrder,
        postprocess,
        postprocess_bytes,
        row_order,
    )
    from phireg.trtllm.build import BuildPlan, Built, build, plan_build, plan_empty_build
    from phireg.trtllm.command import BuildOptions
    from phireg.verification.verify import verify

_MODULES = {
    "calibration.calibrate": ("Calibrated", "calibrate", "statistics_beside"),
    "checkpoint.inspect": ("Inspection", "inspect"),
    "conversion.convert": ("Converted", "convert"),
    "conversion.quantization": ("quantize", "quantize_bytes"),
    "errors": ("PhiregError",),
    "planning.explain": ("explain",),
    "planning.model": ("Plan",),
    "planning.plan": ("plan",),
    "postprocessing.postprocess": (
        "Postprocessed",
        "RowOrder",
        "postprocess",
        "postprocess_bytes",
        "row_order",
    ),
    "trtllm.build": ("BuildPlan", "Built", "build", "plan_build", "plan_empty_build"),
    "trtllm.command": ("BuildOptions",),
    "verification.verify": ("verify",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BuildOptions",
    "BuildPlan",
    "Built",
    "Calibrated",
    "Converted",
    "Inspection",
    "PhiregError",
    "Plan",
    "Postprocessed",
    "RowOrder",
    "build",
    "calibrate",
    "convert",
    "explain",
    "inspect",
    "plan",
    "plan_build",
    "plan_empty_build",
    "postprocess",
    "postprocess_bytes",
    "quantize",
    "quantize_bytes",
    "row_order",
    "statistics_beside",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phireg' has no attribute {name!r}")
    return getattr(import_module(f"phireg.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
