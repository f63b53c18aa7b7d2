"""Any data set that TensorFlow Datasets has prepared, read without TensorFlow."""

import dataclasses
import functools
import operator
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mtl_jax.data.source import Field, Record


@dataclasses.dataclass(frozen=True)
class Tfds:
    """One split of a data set that lies prepared in a folder.

    The files must be such as ``download_and_prepare(file_format="array_record")``
    writes; nothing is downloaded. Fields follow from the features:

    * a feature of numbers of a fixed shape is a field of that shape and dtype;
    * ``ClassLabel`` is an int32 field with ``num_classes`` and ``class_names``;
    * a feature ``b`` nested in ``a`` is the field ``a/b``;
    * text, and features without a fixed shape, are left out.

    Class names of a tensor (a map of classes) are read from ``class_names`` in the
    data set's metadata, where `mtl_jax.data.builders` writes them.

    Attributes:
      name: Such as ``"mnist"``, ``"mnist:3.0.1"`` or ``"name/config"``.
      split: Such as ``"train"`` or ``"train[:90%]"``.
      data_dir: Folder of TFDS data sets; TFDS's own default if None.

    Raises:
      ValueError: If there is no such data set or split, or no usable field in it.
      ImportError: If TFDS is not installed.
    """

    name: str
    split: str
    data_dir: str | None = None

    def __post_init__(self):
        open_split(self.name, self.split, self.data_dir)

    @property
    def fields(self) -> Mapping[str, Field]:
        """The fields that follow from the features."""
        return open_split(self.name, self.split, self.data_dir).fields

    def __len__(self) -> int:
        return len(open_split(self.name, self.split, self.data_dir).examples)

    def __getitem__(self, index: int) -> Record:
        opened = open_split(self.name, self.split, self.data_dir)
        example = opened.examples[index]
        return {
            name: np.asarray(functools.reduce(operator.getitem, path, example), dtype)
            for name, path, dtype in opened.paths
        }


@dataclasses.dataclass(frozen=True)
class OpenSplit:
    """An open split.

    Attributes:
      examples: What ``tfds.data_source`` returns.
      fields: Field name -> its description.
      paths: For each field its name, its keys in an example and its dtype.
    """

    examples: Sequence[Any]
    fields: Mapping[str, Field]
    paths: tuple[tuple[str, tuple[str, ...], np.dtype], ...]


def import_tfds() -> types.ModuleType:
    """Imports ``tensorflow_datasets``, an optional dependency.

    Raises:
      ImportError: If it is not installed; the message has the command.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "TensorFlow Datasets is not installed; run: pip install 'mtl_jax[tfds]'"
        ) from error
    return tensorflow_datasets


# Open files cannot be sent to another process, so they are not kept in the source.
@functools.lru_cache(maxsize=64)
def open_split(name: str, split: str, data_dir: str | None) -> OpenSplit:
    """Opens a split for `Tfds`, which has the arguments and the errors."""
    tfds = import_tfds()
    folder = data_dir or tfds.core.constants.DATA_DIR
    try:
        examples = tfds.data_source(name, split=split, data_dir=folder, download=False)
    except Exception as error:
        # TFDS raises many types, and long lists after a first line with the reason.
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(
            f"split {split!r} of the data set {name!r} cannot be read from {folder} "
            f"({reason}); choose from what is prepared there "
            f"({', '.join(prepared(folder)) or 'nothing'}), or prepare it by "
            "download_and_prepare(file_format='array_record')"
        ) from error
    info = examples.dataset_info
    class_names = (info.metadata or {}).get("class_names", {})
    fields, paths = {}, []
    for path, feature in leaves(info.features):
        key = "/".join(path)
        field = describe(feature, tuple(class_names.get(key, ())))
        if field is not None:
            fields[key] = field
            paths.append((key, path, np.dtype(field.dtype)))
    if not fields:
        raise ValueError(
            f"the data set {name!r} has no feature of numbers of a fixed shape, only "
            f"{sorted(info.features)}; choose another one"
        )
    return OpenSplit(examples, types.MappingProxyType(fields), tuple(paths))


def prepared(data_dir: str) -> list[str]:
    """Lists the data sets in a folder: ``name:version``, ``name/config:version``."""
    folder = epath.Path(data_dir)
    infos = [
        info.parent.relative_to(folder)
        for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
        for info in folder.glob(pattern)
    ]
    return sorted(f"{path.parent}:{path.name}" for path in infos)


def leaves(
    features: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the keys and the feature of every leaf of nested features."""
    for key, feature in features.items():
        path = (*prefix, key)
        if isinstance(feature, import_tfds().features.FeaturesDict):
            yield from leaves(feature, path)
        else:
            yield path, feature


def describe(feature: Any, class_names: tuple[str, ...]) -> Field | None:
    """The field of a TFDS feature, or None for one that is left out."""
    if isinstance(feature, import_tfds().features.ClassLabel):
        names = tuple(feature.names or ())
        return Field((), "int32", feature.num_classes, names)
    if isinstance(feature.np_dtype, dict) or isinstance(feature.shape, dict):
        return None
    dtype = np.dtype(feature.np_dtype)
    if dtype.kind not in "biuf" or None in feature.shape:
        return None
    return Field(
        tuple(feature.shape), dtype.name, len(class_names) or None, class_names
    )
