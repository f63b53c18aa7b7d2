"""Lets the tests of published models share what reads the fixtures."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
