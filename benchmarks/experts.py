"""Trains the main job with 4, 8 and 16 experts, routed by task or not, and without.

    python benchmarks/experts.py --runs runs/results

Writes docs/results_experts.md. Active FLOPs are equal: a token has two experts, and
the dense trunk's MLPs are as wide as both together. Runs that are complete are not
repeated, so it can be stopped and started again.
"""

import argparse
import statistics
from pathlib import Path

from results import ROOT, TASKS, seeds, spread, table, train, value

from mtl_jax.report.results import delta_m, result_rows

KINDS = {
    "router a task": {4: "experts_4", 8: "main", 16: "experts_16"},
    "one router": {4: "shared_router_4", 8: "shared_router", 16: "shared_router_16"},
}
"""Kind of routing -> number of experts -> variant of the config."""

PAGE = """# Results: experts

Written by `python benchmarks/experts.py`: the main job, `earth_digits`, with 4, 8 and
16 experts, with a router a task and with one router, and with dense MLPs instead, at
equal active FLOPs of a token. Seeds: {seeds}. Headline metric of each task on held-out
data, mean ± standard deviation. `router a task, 8` is the main job itself, of which
[another page](results.md) has three further runs.

{scores}

Delta-m is against the mean of the dense runs, over tasks; higher is better. A router a
task takes a forward pass a task, and so more FLOPs a step than a shared router, whose
one pass serves all tasks of a source.

{costs}

{verdict}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "results_experts.md"
    )
    options = parser.parse_args()
    runs = {
        (kind, number): [train(options.runs, name, seed) for seed in options.seeds]
        for kind, variants in KINDS.items()
        for number, name in variants.items()
    }
    dense = [train(options.runs, "dense", seed) for seed in options.seeds]
    options.output.write_text(page(runs, dense))
    print(f"wrote {options.output}")


def page(runs: dict[tuple[str, int], list[dict]], dense: list[dict]) -> str:
    """The page, from the runs of each kind and number of experts."""
    columns = {f"{kind}, {number}": found for (kind, number), found in runs.items()}
    columns["dense"] = dense
    headlines = {task: dense[0]["tasks"][task]["headline"] for task in TASKS}
    scores = [
        (
            task,
            metric,
            *(
                spread(value(run, task, metric) for run in runs)
                for runs in columns.values()
            ),
        )
        for task, metric in headlines.items()
    ]
    baselines = {
        (row.task, row.metric): statistics.mean(
            value(run, row.task, row.metric) for run in dense
        )
        for row in result_rows(dense[0])
    }
    costs = []
    for name, found in columns.items():
        deltas = [delta_m(result_rows(run), baselines).over_tasks for run in found]
        cost = found[0]["cost"]
        costs.append(
            (
                name,
                spread(delta or 0.0 for delta in deltas) + " %",
                f"{cost['parameters']:,}",
                f"{cost['active_parameters']:,}",
                f"{cost['flops_per_step'] / 1e9:.0f} G",
            )
        )
    return PAGE.format(
        seeds=seeds(dense),
        scores=table(("task", "metric", *columns), scores),
        costs=table(
            ("", "delta-m", "parameters", "active parameters", "FLOPs a step"), costs
        ),
        verdict="\n".join(
            verdict(name, found, dense)
            for name, found in columns.items()
            if name != "dense"
        ),
    )


def verdict(name: str, found: list[dict], dense: list[dict]) -> str:
    """Tasks for which every seed is better, or worse, than every dense one."""
    better, worse = [], []
    for task in TASKS:
        metric = dense[0]["tasks"][task]["headline"]
        entry = dense[0]["tasks"][task]["metrics"][metric]
        sign = 1 if entry["higher_is_better"] else -1
        ours = [sign * value(run, task, metric) for run in found]
        theirs = [sign * value(run, task, metric) for run in dense]
        if min(ours) > max(theirs):
            better.append(task)
        elif max(ours) < min(theirs):
            worse.append(task)
    return (
        f"- {name}: every seed better than every dense one for "
        f"{', '.join(better) or 'no task'}; worse for {', '.join(worse) or 'no task'}."
    )


if __name__ == "__main__":
    main()
