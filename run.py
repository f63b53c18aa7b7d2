"""Runs the command line from a source tree: ``python run.py train CONFIG ...``."""

from mtl_jax.cli import main

if __name__ == "__main__":
    main()
