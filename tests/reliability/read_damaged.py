"""Reads damaged files, one after another, in little memory; says what came of each.

    python read_damaged.py CASES.json

Each case is a reader's name, what is given to it and a name; for each a line of JSON is
written: how it ended, the message, by how many bytes the most memory of the process
grew, and how many seconds it took.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

MEMORY = 1536 * 2**20
SECONDS = 60


def arrays(folder, name, shapes):
    from mtl_jax.data.arrays import load_arrays

    wanted = {key: tuple(shape) for key, shape in shapes.items()}
    found = load_arrays(name, wanted, Path(folder))
    assert {key: array.shape for key, array in found.items()} == wanted


def big_vision(path):
    from mtl_jax.models.pretrained import load_big_vision

    load_big_vision(path)


def published(path):
    from mtl_jax.models.pretrained import read_arrays

    read_arrays(path)


def huggingface(folder, family):
    from mtl_jax.models import pretrained

    pretrained.load_huggingface(folder, getattr(pretrained, f"convert_{family}"))


def timm(folder, family):
    from mtl_jax.models.pretrained import load_timm

    load_timm(folder, num_heads=2)


def tfds(folder, name):
    from mtl_jax.data.sources.tfds import Tfds

    source = Tfds(name, "train", folder)
    for index in range(min(len(source), 1000)):
        record = source[index]
        for key, field in source.fields.items():
            assert record[key].shape == field.shape


def pages(folder, other):
    from mtl_jax.report import comparison_table, write_comparison, write_report

    write_report(Path(folder))
    comparison_table([Path(folder), Path(other)])
    write_comparison([Path(folder), Path(other)], Path(folder) / "page.html")


def run(folder):
    from mtl_jax.configuration import build, from_document
    from mtl_jax.train import RunFolder

    opened = RunFolder(Path(folder), writes=False)
    document = opened.read_json("config.json")
    build(from_document(document))
    opened.truncate("metrics.jsonl", 10**9, lambda line: line)


READERS = {
    reader.__name__: reader
    for reader in (arrays, big_vision, published, huggingface, timm, tfds, pages, run)
}


def memory(name):
    """Bytes of a kind of memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def forget_the_peak():
    """What the resource module calls the peak is also that of the parent."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")


def main():
    import jax

    jax.config.update("jax_platforms", "cpu")
    import mtl_jax.models.pretrained
    import mtl_jax.report
    import mtl_jax.train  # noqa: F401

    cases = json.loads(Path(sys.argv[1]).read_text())
    if any(case["reader"] == "tfds" for case in cases):
        import tensorflow_datasets  # noqa: F401
    size = int(Path("/proc/self/statm").read_text().split()[0])
    used = size * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for case in cases:
        before, started, message = forget_the_peak(), time.monotonic(), ""
        signal.alarm(SECONDS)
        try:
            READERS[case["reader"]](*case["arguments"])
            outcome = "read"
        except (ValueError, OSError) as error:
            outcome, message = "refused", str(error)
        except Exception as error:
            outcome, message = "traceback", traceback.format_exc() + str(error)
        signal.alarm(0)
        line = {
            "outcome": outcome,
            "message": message,
            "grown": memory("VmHWM") - before,
            "seconds": time.monotonic() - started,
        }
        print(json.dumps(case | line), flush=True)


if __name__ == "__main__":
    main()
