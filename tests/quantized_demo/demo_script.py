"""benchmarks/quantize_demo.py, which measures, as a module."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
script = import_module("quantize_demo")
sys.path.pop(0)
