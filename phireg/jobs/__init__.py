"""What the command line does, as functions for people who script.

>>> from phireg import jobs
>>> planned = jobs.plan("./Phi-3-small-8k-instruct", family="phi3-small", tp_size=2)
>>> jobs.convert(planned, "./ckpt")  # doctest: +SKIP

All raise subclasses of :class:`phireg.errors.PhiregError` for anything that is wrong with the
input; nothing else is expected.
"""

from phireg.errors import PhiregError
from phireg.jobs.build import BuildPlan, Built, build, plan_build, plan_empty_build
from phireg.jobs.calibrate import Calibrated, calibrate, statistics_beside
from phireg.jobs.convert import Converted, convert
from phireg.jobs.explain import explain
from phireg.jobs.families import FamilyInfo, families
from phireg.jobs.inspect import Inspection, inspect
from phireg.jobs.plan import Planned, plan
from phireg.jobs.postprocess import (
    Postprocessed,
    RowOrder,
    postprocess,
    postprocess_bytes,
    row_order,
)
from phireg.jobs.quantize import quantize, quantize_bytes
from phireg.jobs.verify import verify
from phireg.trtllm.command import BuildOptions

__all__ = [
    "BuildOptions",
    "BuildPlan",
    "Built",
    "Calibrated",
    "Converted",
    "FamilyInfo",
    "Inspection",
    "PhiregError",
    "Planned",
    "Postprocessed",
    "RowOrder",
    "build",
    "calibrate",
    "convert",
    "explain",
    "families",
    "inspect",
    "plan",
    "plan_build",
    "plan_empty_build",
    "postprocess",
    "postprocess_bytes",
    "quantize",
    "quantize_bytes",
    "statistics_beside",
    "row_order",
    "verify",
]
