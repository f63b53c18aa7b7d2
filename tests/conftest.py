"""Strict numerics and eight host devices for every test, compiled in a hurry."""

import gc
import os

import jax

# Tests compile much and compute little.
flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# The older emitters take half the time of the newer to compile. Later releases have no
# older ones, and abort where a flag is unknown to them.
if jax.__version_info__ < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
# Where in a test an operation stems from: nobody reads it, and stacks are deep.
jax.config.update("jax_traceback_in_locations_limit", 1)
# Traces are many small objects that live on; looking for garbage among them is slow.
gc.set_threshold(100_000, 20, 20)

jax.config.update("jax_platforms", "cpu")
# For the processes that tests start: with libtpu installed, JAX would try TPUs first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Files of a minute or more, the longest first, so that no process of several is left
# alone with one at the end.
LONGEST = (
    "test_docs.py",
    "test_cli.py",
    "test_program.py",
    "test_methods.py",
    "test_gradients.py",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first; all else stays in order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
