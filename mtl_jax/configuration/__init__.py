"""Configs: found by name, changed from the command line, saved as JSON.

A config file is Python with a dict ``VARIANTS`` from variant names to functions that
return a `fiddle.Config` of an `mtl_jax.train.Experiment` (the first one is the
default), and a function ``smoke`` that shrinks such a config to a few small steps.
"""

from mtl_jax.configuration.document import differences, to_document
from mtl_jax.configuration.fields import build, override
from mtl_jax.configuration.loading import (
    config_folder,
    full_name,
    known_configs,
    load_config,
)
from mtl_jax.configuration.trust import TRUSTED_MODULES, from_document

__all__ = [
    "TRUSTED_MODULES",
    "build",
    "config_folder",
    "differences",
    "from_document",
    "full_name",
    "known_configs",
    "load_config",
    "override",
    "to_document",
]
