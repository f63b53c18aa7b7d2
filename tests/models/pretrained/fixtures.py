"""Tiny models as they are published, with the features of two images."""

import dataclasses
from pathlib import Path

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent / "fixtures"


def expected(name):
    """What the library that a model is from makes of images, by their kind."""
    return load_file(FOLDER / name / "expected.safetensors")


def features(pretrained, images, **fields):
    """What our trunk makes of images."""
    trunk = dataclasses.replace(fdl.build(pretrained.trunk), **fields)
    apply = jax.jit(lambda params: trunk.apply({"params": params}, jnp.asarray(images)))
    return np.asarray(apply(pretrained.params))
