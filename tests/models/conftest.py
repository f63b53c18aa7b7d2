"""Lets the tests of models share a vision transformer in float64."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
