"""Any data set that TensorFlow Datasets has prepared, read without TensorFlow."""

import dataclasses
import functools
import json
import operator
import re
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from etils import epath

from mtl_jax.data.source import Field, Record

MAX_CLASSES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Tfds:
    """One split of a data set that lies prepared in a folder.

    The files must be such as ``download_and_prepare(file_format="array_record")``
    writes; nothing is downloaded, and none of the data set's own code is run. Fields
    follow from the features:

    * a feature of numbers of a fixed shape is a field of that shape and dtype;
    * ``ClassLabel`` is an int32 field with ``num_classes`` and ``class_names``;
    * a feature ``b`` nested in ``a`` is the field ``a/b``;
    * text, and features without a fixed shape, are left out.

    Class names of a tensor (a map of classes) are read from ``class_names`` in the
    data set's metadata, where `mtl_jax.data.builders` writes them.

    Attributes:
      name: Such as ``"mnist"``, ``"mnist:3.0.1"`` or ``"name/config"``. Without a
        version it is the highest one in the folder.
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
        if not 0 <= index < len(opened.examples):
            raise IndexError(index)
        try:
            example = opened.examples[index]
            return {
                name: np.asarray(
                    functools.reduce(operator.getitem, path, example), dtype
                )
                for name, path, dtype in opened.paths
            }
        except Exception as error:
            # A damaged file raises a different error for each place of the damage.
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise OSError(
                f"record {index} of split {self.split!r} of the data set {self.name!r} "
                f"cannot be read ({reason}); prepare the data set again"
            ) from error


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
    folder = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        directory = newest(name, folder)
        check_description(directory)
        examples = tfds.builder_from_directory(directory).as_data_source(split=split)
        fields, paths = usable(examples.dataset_info)
    except Exception as error:
        # TFDS raises many types, and long lists after a first line with the reason.
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(
            f"split {split!r} of the data set {name!r} cannot be read from {folder} "
            f"({reason}); choose from what is prepared there "
            f"({', '.join(prepared(folder)) or 'nothing'}), or prepare it by "
            "download_and_prepare(file_format='array_record')"
        ) from error
    if not fields:
        raise ValueError(
            f"the data set {name!r} has no feature of numbers of a fixed shape, only "
            f"{sorted(examples.dataset_info.features)}; choose another one"
        )
    return OpenSplit(examples, types.MappingProxyType(fields), tuple(paths))


def usable(
    info: Any,
) -> tuple[dict[str, Field], list[tuple[str, tuple[str, ...], np.dtype]]]:
    """Fields, and their paths, of the features in a data set's description."""
    class_names = (info.metadata or {}).get("class_names", {})
    fields, paths = {}, []
    for path, feature in leaves(info.features):
        key = "/".join(path)
        field = describe(feature, tuple(class_names.get(key, ())))
        if field is not None:
            fields[key] = field
            paths.append((key, path, np.dtype(field.dtype)))
    return fields, paths


def newest(name: str, folder: epath.Path) -> epath.Path:
    """The files of a data set, of its highest version where the name has none.

    They alone are read: by name, TFDS would run the code that made the data set.
    """
    found = [e for e in prepared(folder) if name in (e, e.rpartition(":")[0])]
    if not found:
        raise ValueError("it is not there")

    def version(entry: str) -> list[int]:
        return [int(part) for part in entry.rpartition(":")[2].split(".")]

    name, _, number = max(found, key=version).rpartition(":")
    return folder / name / number


def check_description(directory: epath.Path) -> None:
    """Refuses descriptions that TFDS should not be given.

    A data set may come from someone else: TFDS would import any module that is named
    there, and TensorFlow for a dtype that NumPy has not, and would make up names for
    any number of classes.
    """
    features = import_tfds().features
    known = {
        name
        for value in vars(features).values()
        if isinstance(value, type) and issubclass(value, features.FeatureConnector)
        for name in (f"{value.__module__}.{value.__name__}", *value.ALIASES)
    }
    for file in ("features.json", "dataset_info.json"):
        keys = {"pythonClassName", "python_class_name"}
        if file == "features.json":
            keys.add("type")  # what older releases of TFDS write
        try:
            document = json.loads((directory / file).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(document, dict):
            raise ValueError(f"{file} is not a JSON object")
        for name in values_under(keys, document):
            if name not in known:
                raise ValueError(
                    f"{file} names {name!r}, which is none of TFDS's own features"
                )
        for dtype in {*values_under({"dtype"}, document)} - {"string", "bfloat16"}:
            try:
                np.dtype(dtype)
            except TypeError as error:
                raise ValueError(f"{file} names the dtype {dtype!r}") from error
        classes = 0
        for number in values_under({"numClasses", "num_classes"}, document):
            classes += int(number)
            if classes > MAX_CLASSES:
                raise ValueError(f"{file} has a feature of {number} classes")
        if file == "dataset_info.json":
            check_places(document)


def check_places(document: Mapping[str, Any]) -> None:
    """Refuses names of a data set and its splits that lead out of its folder.

    The names of its files are made of them.
    """
    keys = {"name", "filepathTemplate", "filepath_template"}
    splits = document.get("splits", [])
    for part in (document, *(splits if isinstance(splits, list) else ())):
        for key in keys & set(part):
            name = str(part[key])
            if ".." in name or not re.fullmatch(r"[^/\\\0]*", name):
                raise ValueError(
                    f"dataset_info.json has the {key} {name!r}, which leads out of its "
                    "folder"
                )


def values_under(keys: Set[str], node: Any) -> Iterator[Any]:
    """Yields every string or number under one of some keys in a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from values_under(keys, item)
        elif key in keys:
            yield item
        elif key == "json":
            # Some features have their content in a string.
            yield from values_under(keys, json.loads(item))


def prepared(folder: epath.Path) -> list[str]:
    """Lists the data sets in a folder: ``name:version``, ``name/config:version``."""
    infos = [
        info.parent.relative_to(folder)
        for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
        for info in folder.glob(pattern)
    ]
    return sorted(
        f"{path.parent}:{path.name}"
        for path in infos
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
    )


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
