"""Help for testing families: the conformance tests, and checkpoints made to order.

Install it with ``pip install phireg[testing]``.
"""

from phireg.testing.conformance import FamilyConformance
from phireg.testing.cut import cut
from phireg.testing.factory import write_random_model
from phireg.testing.tiny import write_tiny_model

__all__ = ["FamilyConformance", "cut", "write_random_model", "write_tiny_model"]
