"""Weak and strong scaling of a model of a billion parameters, without a pod.

    python benchmarks/scaling.py

compiles the training step of `vision_moe:base_1b` for slices of 8 to 4,096 chips of
v5p, prints the tables of docs/scaling.md and draws docs/images/scaling.png. It takes
less than a minute of processor time for each of seven compilations; what is in
runs/scaling already is not compiled again.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

from mtl_jax import configuration, scaling, train

CONFIG = "vision_moe:base_1b"
SLICES = ("v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8", "v5p:16x16x16")
WEAK_EXAMPLES_PER_CHIP = 64
STRONG_BATCH_SIZE = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/scaling.png"))
    options = parser.parse_args()
    scaling.prepare_environment()
    weak, strong = [], []
    for name in SLICES:
        chips = scaling.make_topology(name).num_chips
        weak.append(compiled(name, WEAK_EXAMPLES_PER_CHIP * chips, options.folder))
        # The others would need more memory, or hold no whole routing group.
        if STRONG_BATCH_SIZE // chips <= 4 * WEAK_EXAMPLES_PER_CHIP:
            strong.append(compiled(name, STRONG_BATCH_SIZE, options.folder))
    for title, documents in (("weak", weak), ("strong", strong)):
        print(f"\n{title} scaling\n")
        print(table(documents))
    draw(weak, strong, options.plot)


def compiled(topology: str, batch_size: int, folder: Path) -> dict:
    """The estimate for a slice and a batch, from the folder or made now."""
    path = folder / f"{topology.replace(':', '-')}-{batch_size}.json"
    if not path.exists():
        config = configuration.load_config(CONFIG)
        config.mixture.batch_size = config.evaluation_batch_size = batch_size
        experiment = configuration.build(config)
        train.validate(experiment, runs_here=False)
        slice_ = scaling.make_topology(topology)
        estimate = scaling.estimate(experiment, slice_, optimized=False)
        scaling.write_estimate(estimate, path, CONFIG)
    return json.loads(path.read_text())


def table(documents: list[dict]) -> str:
    """A Markdown table, one row a slice."""
    lines = [
        "| chips | examples a chip | peak GiB | compute | memory | all-to-all | "
        "sums of gradients | step | bound by | MFU at most | efficiency |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    first = speed(documents[0])
    for document in documents:
        roofline = document["roofline"]
        links = {
            axes: roofline["exposed"].get(axes, 0) + roofline["overlapped"].get(axes, 0)
            for axes in {*roofline["exposed"], *roofline["overlapped"]}
        }
        tokens = links.pop("expert", 0.0)
        cells = [
            f"{document['chips']:,}",
            f"{document['batch_size'] / document['chips']:g}",
            f"{document['bytes']['peak'] / 2**30:.1f}",
            *(f"{roofline[name] * 1e3:.1f}" for name in ("compute", "memory")),
            f"{tokens * 1e3:.1f}",
            f"{sum(links.values()) * 1e3:.1f}",
            f"{document['seconds'] * 1e3:.1f}",
            document["bound"],
            f"{document['utilization']:.0%}",
            f"{speed(document) / first:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed(document: dict) -> float:
    """Examples a second of one chip."""
    return document["examples_per_second"] / document["chips"]


def draw(weak: list[dict], strong: list[dict], path: Path) -> None:
    """Examples a second by chips, with what perfect scaling would give."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for documents, label, color in (
        (weak, f"weak: {WEAK_EXAMPLES_PER_CHIP} examples a chip", "tab:blue"),
        (strong, f"strong: a batch of {STRONG_BATCH_SIZE:,}", "tab:orange"),
    ):
        chips = [document["chips"] for document in documents]
        rates = [document["examples_per_second"] for document in documents]
        axes.loglog(chips, rates, "o-", color=color, label=label)
        perfect = [rates[0] * number / chips[0] for number in chips]
        axes.loglog(chips, perfect, ":", color=color)
    axes.set_xticks([document["chips"] for document in weak])
    axes.set_xticklabels([f"{document['chips']:,}" for document in weak])
    axes.minorticks_off()
    axes.set_xlabel("chips (TPU v5p)")
    axes.set_ylabel("examples a second, at most")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
