"""The packages in examples/, importable from their sources."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES / name / "src") for name in ("phireg-phi4", "phireg-phi35")]
