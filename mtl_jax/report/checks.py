"""What the files of a run must be made of, so that pages can be made of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_CLASSES = 100_000
MAX_NUMBER = 1e300

_TEXT, _FLAG = "text", "true or false"
_NUMBER, _COUNT = "a number or null", "a whole number, at least 0, or null"
_LARGEST_COUNT = 2**63

# A key with a question mark may be absent or null; a star stands for any key.
_RESULT = {
    "config": _TEXT,
    "seed": _COUNT,
    "num_steps": _COUNT,
    "tasks": {
        "*": {
            "metrics": {
                "*": {
                    "value": _NUMBER,
                    "higher_is_better": _FLAG,
                    "constant_predictor?": _NUMBER,
                }
            },
            "headline": _TEXT,
            "output": {
                "kind": _TEXT,
                "dense?": _FLAG,
                "class_names?": [_TEXT],
                "num_classes?": _COUNT,
            },
            "sources": [_TEXT],
        }
    },
    "sources": {
        "*": {
            "train_examples?": _COUNT,
            "test_examples?": _COUNT,
            "examples_per_step?": _COUNT,
            "tasks?": [_TEXT],
            "image_shape?": [_COUNT],
        }
    },
    "mesh?": {"*": _COUNT},
    "method?": {
        "aggregator?": _TEXT,
        "gradients_at?": _TEXT,
        "sharpness_rho?": _NUMBER,
    },
    "cost?": {"*": _NUMBER},
    "versions?": {"*": _TEXT},
    "device?": _TEXT,
    "wall_time_seconds?": _NUMBER,
}


def check_result(file: Path, result: Mapping[str, Any]) -> None:
    """Rejects a result without the parts that every page needs, or with odd ones.

    Args:
      file: Where it is from.
      result: What is in ``result.json``.

    Raises:
      ValueError: Names the file, the part and what it must be.
    """
    _check(file, result, _RESULT, "")
    for key in ("seed", "num_steps"):
        if result[key] is None:
            raise ValueError(f"{file} has no {key!r}: the file is damaged, run again.")
    if not result["tasks"]:
        raise ValueError(f"{file} has an empty 'tasks': a report needs a trained task.")
    for task, entry in result["tasks"].items():
        output = entry["output"]
        if entry["headline"] not in entry["metrics"]:
            raise ValueError(
                f"{file} has headline {entry['headline']!r} of task {task!r}, which is "
                f"none of its metrics {list(entry['metrics'])}: name one of them."
            )
        if output["kind"] not in ("classes", "values"):
            raise ValueError(
                f"{file} has the kind {output['kind']!r} of task {task!r}: it must be "
                "'classes' or 'values'."
            )
        if (output.get("num_classes") or 0) > MAX_CLASSES:
            raise ValueError(
                f"{file} has {output['num_classes']} classes of task {task!r}: it must "
                f"be at most {MAX_CLASSES:,}."
            )


def check_timing(file: Path, number: int, timing: Mapping[str, Any]) -> None:
    """Rejects a line of ``timings.jsonl`` with something else than numbers.

    Raises:
      ValueError: Names the file, the line and the part.
    """
    _check(Path(f"{file}, line {number},"), timing, {"*": _NUMBER}, "")


def _check(file: Path, value: Any, expected: Any, where: str) -> None:
    fault = None
    if isinstance(expected, dict):
        if not isinstance(value, Mapping):
            fault = "an object"
        elif "*" in expected:
            for key, item in value.items():
                _check(file, item, expected["*"], f"{where}.{key}")
        else:
            _check_keys(file, value, expected, where)
    elif isinstance(expected, list):
        if not isinstance(value, list):
            fault = "a list"
        else:
            for index, item in enumerate(value):
                _check(file, item, expected[0], f"{where}.{index}")
    elif not _fits(value, expected):
        fault = expected
    if fault:
        raise ValueError(
            f"{file} has {where.strip('.')} = {_short(value)}: it must be {fault}; the "
            "file is damaged, run again."
        )


def _check_keys(
    file: Path, value: Mapping[str, Any], expected: Mapping[str, Any], where: str
) -> None:
    for key, inner in expected.items():
        name = key.removesuffix("?")
        if value.get(name) is None and key != name:
            continue
        if name not in value:
            place = f" of {where.strip('.')}" if where else ""
            raise ValueError(
                f"{file} lacks {name!r}{place}: the file is damaged, run again."
            )
        _check(file, value[name], inner, f"{where}.{name}")


def _fits(value: Any, expected: str) -> bool:
    if expected is _TEXT:
        return isinstance(value, str)
    if expected is _FLAG:
        return isinstance(value, bool)
    if value is None:
        return True
    if isinstance(value, bool):
        return False
    if expected is _COUNT:
        return isinstance(value, int) and 0 <= value < _LARGEST_COUNT
    # What is not finite is read as absent.
    large = isinstance(value, int) and abs(value) > MAX_NUMBER
    return isinstance(value, int | float) and not large


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
