"""One module a data set; each holds a class that is a `mtl_jax.data.source.Source`."""

SPLITS = ("train", "test")
"""The splits of every source that ships with the package."""


def check_split(split: str) -> None:
    """Checks the name of a split.

    Raises:
      ValueError: If it's none of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {SPLITS}")
