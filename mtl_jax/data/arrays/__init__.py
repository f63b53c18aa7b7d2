"""The arrays that ship with the package; ``LICENSES.md`` beside them has the credits.

``tools/build_arrays.py`` builds them and documents their content.
"""

import pathlib

import numpy as np

from mtl_jax.archives import read_npz

FOLDER = pathlib.Path(__file__).parent


def load_arrays(
    name: str, shapes: dict[str, tuple[int, ...]], folder: pathlib.Path = FOLDER
) -> dict[str, np.ndarray]:
    """Loads an embedded file of arrays.

    Args:
      name: File name, such as ``"earth.npz"``.
      shapes: The arrays that the file must hold and their shapes.
      folder: Where the file lies.

    Returns:
      Array name -> array.

    Raises:
      ValueError: If the file is missing, damaged or holds something else.
    """
    path = folder / name
    remedy = "reinstall mtl_jax, or build the file again by tools/build_arrays.py"
    try:
        arrays = read_npz(path, shapes)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the data file {path} is missing or damaged ({error}); {remedy}"
        ) from error
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            raise ValueError(
                f"array {key!r} of the data file {path} has shape "
                f"{arrays[key].shape} instead of {shape}; {remedy}"
            )
    return arrays
