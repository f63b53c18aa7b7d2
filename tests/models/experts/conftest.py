"""Lets the tests of experts share a small model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
