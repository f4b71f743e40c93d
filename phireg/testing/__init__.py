"""Test kit for plugin authors: conformance tests, and source checkpoints made to order.

Install it with ``pip install phireg[testing]``.
"""

from phireg.testing.conformance import FamilyConformance
from phireg.testing.sources import cut, write_random_model, write_tiny_model

__all__ = ["FamilyConformance", "cut", "write_random_model", "write_tiny_model"]
