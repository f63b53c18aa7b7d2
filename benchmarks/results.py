"""Trains the main job and its single-task baselines, and writes docs/results.md.

    python benchmarks/results.py --runs runs/results

Runs that are complete are not repeated, so it can be stopped and started again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from mtl_jax.report.results import delta_m, result_rows

ROOT = Path(__file__).parent.parent
TASKS = ("surface", "climate", "elevation", "log_slope", "digit", "left", "right")

PAGE = """# Results

Written by `python benchmarks/results.py`. Every number is from held-out data: Earth
tiles from blocks of the globe that touch no training tile, and digits that are in no
training image. Mean ± standard deviation over seeds: {multitask_seeds} of the main job,
{alone_seeds} of the single-task runs. Which method of surgery, balancing or sharpness
helps is measured on smaller networks, in [the results of methods](results_methods.md);
how many experts, and routed by what, in [the results of experts](results_experts.md).

## The main job

`earth_digits` trains one mixture-of-experts vision transformer with a router a task on
three data sets and seven tasks at once, by the plain sum of task gradients. Its
single-task baselines, `earth_digits:single_<task>`, have the same trunk with one router
a layer, and see as many updates and as many examples of their data set: the same
budget for each task, seven times the trunks.

{table}

The constant predictor is the best single answer: the most frequent class, or the mean.

{verdict}

{delta}

## Cost

{cost}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--baseline-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    multitask = [train(options.runs, "main", seed) for seed in options.seeds]
    alone = {
        task: [
            train(options.runs, f"single_{task}", seed)
            for seed in options.baseline_seeds
        ]
        for task in TASKS
    }
    options.output.write_text(page(multitask, alone))
    print(f"wrote {options.output}")


def train(runs: Path, variant: str, seed: int) -> dict:
    """The result of one run, trained if it is not there yet."""
    folder = runs / f"{variant}-{seed}"
    command = (sys.executable, str(ROOT / "run.py"), "train", f"earth_digits:{variant}")
    options = ("--seed", str(seed), "--workdir", str(folder))
    # Returns at once where the run is complete, and fails if its config was another.
    subprocess.run((*command, *options), check=True)
    return json.loads((folder / "result.json").read_text())


def page(multitask: list[dict], alone: dict[str, list[dict]]) -> str:
    """The page of results, from the runs of the main job and of each task alone."""
    rows = []
    for task in TASKS:
        for metric, entry in multitask[0]["tasks"][task]["metrics"].items():
            arrow = "↑" if entry["higher_is_better"] else "↓"
            constant = entry["constant_predictor"]
            rows.append(
                (
                    task,
                    f"{metric} {arrow}",
                    spread(value(run, task, metric) for run in multitask),
                    spread(value(run, task, metric) for run in alone[task]),
                    "–" if constant is None else f"{constant:.3f}",
                )
            )
    baselines = {
        (task, metric): statistics.mean(value(run, task, metric) for run in alone[task])
        for task in TASKS
        for metric in multitask[0]["tasks"][task]["metrics"]
    }
    deltas = [delta_m(result_rows(run), baselines) for run in multitask]
    left_out = f", {deltas[0].left_out}" if deltas[0].left_out else ""
    cost = multitask[0]["cost"]
    return PAGE.format(
        multitask_seeds=seeds(multitask),
        alone_seeds=seeds(alone[TASKS[0]]),
        table=table(
            ("task", "metric", "multitask", "single task", "constant predictor"), rows
        ),
        verdict=verdict(multitask, alone),
        delta=(
            f"Delta-m against the single-task runs{left_out}:\n\n"
            f"- mean over metrics, lower is better: "
            f"{spread(delta.over_metrics or 0.0 for delta in deltas)} %\n"
            f"- mean over tasks, higher is better: "
            f"{spread(delta.over_tasks or 0.0 for delta in deltas)} %"
        ),
        cost=table(
            ("quantity", "main job"),
            [
                ("parameters", f"{cost['parameters']:,}"),
                ("active parameters", f"{cost['active_parameters']:,}"),
                ("FLOPs a step", f"{cost['flops_per_step'] / 1e9:.1f} G"),
                ("steps", str(multitask[0]["num_steps"])),
                ("examples a second", f"{cost['examples_per_second']:.0f}"),
                ("waiting for data", f"{cost['input_stall']:.1%}"),
                ("whole run", f"{multitask[0]['wall_time_seconds']:.0f} s"),
                ("device", multitask[0]["device"]),
            ],
        ),
    )


def verdict(multitask: list[dict], alone: dict[str, list[dict]]) -> str:
    """Which tasks the others helped, where the seeds leave no doubt."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "overlap": []}
    for task in TASKS:
        metric, entry = next(iter(multitask[0]["tasks"][task]["metrics"].items()))
        sign = 1 if entry["higher_is_better"] else -1
        together = [sign * value(run, task, metric) for run in multitask]
        apart = [sign * value(run, task, metric) for run in alone[task]]
        if min(together) > max(apart):
            found["better"].append(task)
        elif max(together) < min(apart):
            found["worse"].append(task)
        else:
            found["overlap"].append(task)
    names = {key: ", ".join(tasks) or "none" for key, tasks in found.items()}
    return (
        "By the first metric of each task, every seed of the main job does better than "
        f"every seed of the task alone for: {names['better']}; worse for: "
        f"{names['worse']}. The seeds overlap for: {names['overlap']}."
    )


def value(result: dict, task: str, metric: str) -> float:
    return result["tasks"][task]["metrics"][metric]["value"]


def seeds(results: list[dict]) -> str:
    return ", ".join(str(result["seed"]) for result in results)


def spread(values: Iterable[float]) -> str:
    values = list(values)
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
