"""The installed JAX must compute stacked task gradients rightly."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mtl_jax.optim import check_task_gradients


def test_installed_release_is_right():
    check_task_gradients()


def test_installed_release_is_right_as_users_compile():
    """Compiled with care, unlike elsewhere in the tests."""
    code = "from mtl_jax.optim import check_task_gradients as check; check()"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_wrong_gradients_are_refused():
    def wrong_beyond_first_task(pullback):
        def pull_back_all(cotangents):
            right = jax.vmap(pullback)(cotangents)
            return jax.tree.map(lambda leaf: leaf.at[1:].multiply(0.9), right)

        return pull_back_all

    with pytest.raises(RuntimeError, match=rf"jax {jax.__version__}.*task 1.*!=0.10.2"):
        check_task_gradients(wrong_beyond_first_task)


def test_nan_is_refused():
    def broken(pullback):
        return lambda stack: jax.tree.map(
            lambda leaf: leaf * jnp.nan, jax.vmap(pullback)(stack)
        )

    with pytest.raises(RuntimeError, match="wrong task gradients"):
        check_task_gradients(broken)
