"""The quickstart's modules are scripts in a folder; put it where they look for each other."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "quickstart"))
