"""The embedded sources as TensorFlow Datasets, written without TensorFlow."""

from mtl_jax.data.sources.tfds import import_tfds


def prepare(name: str, data_dir: str | None = None) -> str:
    """Writes an embedded source as a TFDS data set of `array_record` files.

    Does nothing if it's already there. `mtl_jax.data.sources.tfds.Tfds` and
    ``tfds.data_source`` read it back, in the order of the source.

    Args:
      name: ``"earth"``, ``"digits"`` or ``"multi_digits"``.
      data_dir: Folder of TFDS data sets; TFDS's own default if None.

    Returns:
      The folder of the data set.

    Raises:
      ValueError: If the name is none of these.
      ImportError: If TFDS is not installed.
    """
    import_tfds()
    # These modules derive from classes of TFDS, which is an optional dependency.
    from mtl_jax.data.builders import embedded

    builders = {
        builder.name: builder
        for builder in (embedded.Earth, embedded.Digits, embedded.MultiDigits)
    }
    if name not in builders:
        raise ValueError(f"name {name!r} is unknown; choose one of {sorted(builders)}")
    builder = builders[name](data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)
