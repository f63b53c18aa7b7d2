"""From the records of benchmarks/methods.py to a page of tables.

Records are as `methods.measure` makes them.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl_jax.report import delta_m_tasks
from mtl_jax.report.delta_m import OVER_TASKS
from mtl_jax.report.results import direction

TITLES = {"multi_mnist": "Multi-MNIST", "earth": "Earth"}

PAGE = """# Results: methods

Written by `python benchmarks/methods.py`. Does a method help, on two problems small
enough to treat every method with the same care? Both networks have a trunk of two or
three layers and a linear head a task. What there is to gain or lose by the choice of a
method is small here, and says little about large networks.

Every method, the plain sum and the single-task networks included, chose its learning
rate among {rates} by delta-m on a validation part of the training data (digits and
blocks of the globe that are in no other split), with seed {seed}; all other
hyperparameters are defaults. Then it was trained with the seeds {seeds} and tested:
mean ± standard deviation. Adam, linear warm-up, cosine decay. All get the same number
of updates, each single-task network as many as a multitask one; `sdmgrad` and `modo`
see three batches an update, and `pcd` follows the first task.

- **Δm**: {delta}, in per cent, relative to the mean of the single-task
  networks. With one metric a task, Δm over metrics is the same with the other sign.
- **rank**: place among the methods, averaged over the tasks.
- **against the sum**: *better* (*worse*) where Δm of each seed is above (below) that of
  every seed of the plain sum. For methods that are equal, chance does either once in
  {odds}: among {count}, expect {by_chance:.0f} of each on either problem for no reason.
- **step**: time of a training step over that of the plain sum, which takes one backward
  pass.

{sections}
## On both problems

{both}

## Cost

{cost}
"""

SECTION = """## {title}

{examples[train]:,} training, {examples[valid]:,} validation and {examples[test]:,} test
examples, {num_steps} updates of {batch_size} examples.

{table}

{verdicts}
"""


def page(
    results: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str], baseline: str
) -> str:
    """The whole page.

    Args:
      results: Data set -> what `methods.measure` returns.
      kinds: Method -> what it looks at.
      baseline: The method that the others are compared with.

    Returns:
      Markdown.
    """
    verdicts = {data: judge(result, baseline) for data, result in results.items()}
    problem = next(iter(results.values()))["problem"]
    seeds = problem["seeds"]
    odds = math.comb(2 * len(seeds), len(seeds))
    return PAGE.format(
        rates=", ".join(f"{rate:g}" for rate in problem["learning_rates"]),
        seed=seeds[0],
        seeds=", ".join(map(str, seeds)),
        delta=OVER_TASKS.removeprefix("Δm "),
        odds=odds,
        count=len(kinds) - 1,
        by_chance=(len(kinds) - 1) / odds,
        sections="\n".join(
            section(data, results[data], kinds, verdicts[data], baseline)
            for data in results
        ),
        both=on_all(verdicts),
        cost=cost(results),
    )


def section(
    data: str,
    result: Mapping[str, Any],
    kinds: Mapping[str, str],
    verdicts: Mapping[str, str],
    baseline: str,
) -> str:
    """The table of one data set, best method first."""
    tasks = result["problem"]["tasks"]
    methods = result["methods"]
    ranks = mean_ranks(result)
    delta = {name: deltas(result, record) for name, record in methods.items()}
    fastest = {name: step_seconds(record) for name, record in methods.items()}
    header = (
        "method",
        "looks at",
        *(
            f"{task}: {metric.replace('_', ' ')} {direction(higher)}"
            for task, (metric, higher) in tasks.items()
        ),
        "Δm ↑",
        "rank ↓",
        "against the sum",
        "step",
        "learning rate",
    )
    alone = [
        spread([run["test"][task] for run in chosen(result["single"][task])], 3)
        for task in tasks
    ]
    rates = " / ".join(f"{result['single'][task]['best']:g}" for task in tasks)
    rows = [("*single task*", "–", *alone, "0", "–", "–", "–", rates)]
    for name in sorted(methods, key=lambda name: -statistics.fmean(delta[name])):
        record = methods[name]
        scores = [
            spread([run["test"][task] for run in chosen(record)], 3) for task in tasks
        ]
        rows.append(
            (
                f"`{name}`",
                kinds[name],
                *scores,
                spread(delta[name], 2),
                f"{ranks[name]:.1f}",
                verdicts[name],
                f"{fastest[name] / fastest[baseline]:.1f}",
                f"{record['best']:g}",
            )
        )
    return SECTION.format(
        title=TITLES[data],
        table=table(header, rows),
        verdicts=summary(verdicts),
        **result["problem"],
    )


def judge(result: Mapping[str, Any], baseline: str) -> dict[str, str]:
    """Whether the seeds of each method lie apart from those of the baseline."""
    methods = result["methods"]
    reference = deltas(result, methods[baseline])
    verdicts = {}
    for name, record in methods.items():
        values = deltas(result, record)
        if name == baseline:
            verdicts[name] = "is it"
        elif min(values) > max(reference):
            verdicts[name] = "better"
        elif max(values) < min(reference):
            verdicts[name] = "worse"
        else:
            verdicts[name] = "no difference"
    return verdicts


def summary(verdicts: Mapping[str, str]) -> str:
    """One line a verdict."""
    return "\n".join(
        (
            f"- **Better** than the plain sum: {names_with(verdicts, 'better')}.",
            f"- **Worse**: {names_with(verdicts, 'worse')}.",
            "- **No difference** that the seeds could show: "
            f"{names_with(verdicts, 'no difference')}.",
        )
    )


def on_all(verdicts: Mapping[str, Mapping[str, str]]) -> str:
    """What the data sets agree and disagree on."""
    found = {
        name: {by_data[name] for by_data in verdicts.values()}
        for name in next(iter(verdicts.values()))
    }

    def listed(*wanted: str) -> str:
        return names_with(
            {name: str(each == set(wanted)) for name, each in found.items()}, "True"
        )

    return "\n".join(
        (
            f"- Better than the plain sum on both: {listed('better')}.",
            f"- Better on one, no difference on the other: "
            f"{listed('better', 'no difference')}.",
            f"- No difference on either: {listed('no difference')}.",
            f"- Worse on one, no difference on the other: "
            f"{listed('worse', 'no difference')}.",
            f"- Worse on both: {listed('worse')}.",
            f"- Better on one and worse on the other: {listed('better', 'worse')}.",
        )
    )


def cost(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What the records took to make."""
    records = [
        record
        for result in results.values()
        for group in ("single", "methods")
        for record in result[group].values()
    ]
    total = sum(record["cpu_seconds"] for record in records) / 60
    compiling = sum(record["compile_seconds"] for record in records) / 60
    count = sum(len(record["runs"]) for record in records)
    return (
        f"{total:.0f} minutes of one CPU core for {count} runs, of which "
        f"{compiling:.0f} went into compiling {len(records)} programs."
    )


def chosen(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs with the learning rate that was chosen, by seed."""
    return [run for run in record["runs"] if run["learning_rate"] == record["best"]]


def deltas(result: Mapping[str, Any], record: Mapping[str, Any]) -> list[float]:
    """Delta-m on the test split by seed; minus infinity for a run that diverged."""
    tasks = result["problem"]["tasks"]
    references = [
        statistics.mean(run["test"][task] for run in chosen(result["single"][task]))
        for task in tasks
    ]
    higher = [higher for _, higher in tasks.values()]
    found = []
    for run in chosen(record):
        values = [run["test"][task] for task in tasks]
        finite = all(map(math.isfinite, values))
        found.append(
            delta_m_tasks(values, references, higher, list(tasks))
            if finite
            else -math.inf
        )
    return found


def mean_ranks(result: Mapping[str, Any]) -> dict[str, float]:
    """Each method's place by the mean of each task's metric, averaged over tasks."""
    tasks, methods = result["problem"]["tasks"], result["methods"]
    places: dict[str, list[int]] = {name: [] for name in methods}
    for task, (_, higher) in tasks.items():
        sign = -1 if higher else 1
        means = {
            name: sign * statistics.mean(run["test"][task] for run in chosen(record))
            for name, record in methods.items()
        }
        for name, value in means.items():
            # Runs that diverged are nowhere: not a number is below nothing.
            better = sum(other < value for other in means.values())
            places[name].append(1 + better if math.isfinite(value) else len(methods))
    return {name: statistics.mean(found) for name, found in places.items()}


def step_seconds(record: Mapping[str, Any]) -> float:
    """Seconds of a step in the fastest run."""
    steps = record["settings"]["num_steps"]
    return min(run["cpu_seconds"] for run in record["runs"]) / steps


def names_with(verdicts: Mapping[str, str], verdict: str) -> str:
    names = [f"`{name}`" for name, found in verdicts.items() if found == verdict]
    return ", ".join(names) or "none"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}".replace("-", "−")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
