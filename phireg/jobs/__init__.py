"""What the command line does, as functions for people who script.

>>> from phireg import jobs
>>> planned = jobs.plan("./Phi-3-small-8k-instruct", family="phi3-small", tp_size=2)
>>> jobs.convert(planned, "./ckpt")  # doctest: +SKIP

All raise subclasses of :class:`phireg.errors.PhiregError` for anything that is wrong with the
input; nothing else is expected.
"""

from phireg.errors import PhiregError
from phireg.jobs.convert import Converted, convert
from phireg.jobs.explain import explain
from phireg.jobs.families import FamilyInfo, families
from phireg.jobs.inspect import Inspection, inspect
from phireg.jobs.plan import Planned, plan
from phireg.jobs.verify import verify

__all__ = [
    "Converted",
    "FamilyInfo",
    "Inspection",
    "PhiregError",
    "Planned",
    "convert",
    "explain",
    "families",
    "inspect",
    "plan",
    "verify",
]
