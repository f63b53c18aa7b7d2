"""Lets the training tests share one small experiment."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def standard_dtype_promotion():
    """Optax's Adam divides floats by integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield
