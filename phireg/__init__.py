"""Convert Microsoft's Phi models to TensorRT-LLM checkpoints, quantize, verify and run them.

The functions behind the commands are here, imported on first use:

>>> import phireg
>>> plan = phireg.plan("./Phi-3-small-8k-instruct", tp_size=2)  # doctest: +SKIP
>>> phireg.convert(plan, "./ckpt")  # doctest: +SKIP

They raise subclasses of :class:`phireg.errors.PhiregError` for bad input. Plugins import
:mod:`phireg.api`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # of typing, which takes long to import: a Ctrl-C may come meanwhile
if TYPE_CHECKING:
    from typing import Any

    from phireg.calibration.calibrate import Calibrated as Calibrated
    from phireg.calibration.calibrate import calibrate as calibrate
    from phireg.checkpoint.inspect import Inspection as Inspection
    from phireg.checkpoint.inspect import inspect as inspect
    from phireg.conversion.convert import Converted as Converted
    from phireg.conversion.convert import convert as convert
    from phireg.conversion.quantize import quantize as quantize
    from phireg.errors import PhiregError as PhiregError
    from phireg.executor.decoder import Sampling as Sampling
    from phireg.generation.backend import Options as Options
    from phireg.generation.generate import Completion as Completion
    from phireg.generation.generate import generate as generate
    from phireg.migration.migrate import migrate as migrate
    from phireg.planning.model import Plan as Plan
    from phireg.planning.plan import plan as plan
    from phireg.planning.report import explain as explain
    from phireg.postprocessing.postprocess import Postprocessed as Postprocessed
    from phireg.postprocessing.postprocess import RowOrder as RowOrder
    from phireg.postprocessing.postprocess import postprocess as postprocess
    from phireg.postprocessing.postprocess import row_order as row_order
    from phireg.summarization.models import ModelRun as ModelRun
    from phireg.summarization.summarize import summarize as summarize
    from phireg.tensorrt.backends import build as build
    from phireg.tensorrt.backends import plan_build as plan_build
    from phireg.tensorrt.build import BuiltEngine as BuiltEngine
    from phireg.tensorrt.plan import EnginePlan as EnginePlan
    from phireg.trtllm.build import BuildPlan as BuildPlan
    from phireg.trtllm.build import Built as Built
    from phireg.trtllm.command import BuildOptions as BuildOptions
    from phireg.verification.endpoint import verify_endpoint as verify_endpoint
    from phireg.verification.engine import verify_engine as verify_engine
    from phireg.verification.verify import verify as verify

_MODULES = {
    "calibration.calibrate": ("Calibrated", "calibrate"),
    "checkpoint.inspect": ("Inspection", "inspect"),
    "conversion.convert": ("Converted", "convert"),
    "conversion.quantize": ("quantize",),
    "errors": ("PhiregError",),
    "executor.decoder": ("Sampling",),
    "generation.backend": ("Options",),
    "generation.generate": ("Completion", "generate"),
    "migration.migrate": ("migrate",),
    "planning.model": ("Plan",),
    "planning.plan": ("plan",),
    "planning.report": ("explain",),
    "postprocessing.postprocess": (*("Postprocessed", "RowOrder", "postprocess", "row_order"),),
    "summarization.models": ("ModelRun",),
    "summarization.summarize": ("summarize",),
    "tensorrt.backends": ("build", "plan_build"),
    "tensorrt.build": ("BuiltEngine",),
    "tensorrt.plan": ("EnginePlan",),
    "trtllm.build": ("BuildPlan", "Built"),
    "trtllm.command": ("BuildOptions",),
    "verification.endpoint": ("verify_endpoint",),
    "verification.engine": ("verify_engine",),
    "verification.verify": ("verify",),
}
_HOMES = {name: f"phireg.{module}" for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phireg' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
