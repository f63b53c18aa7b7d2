"""Times task-gradient methods against TorchJD and LibMTL, in one process on one core.

    pip install -e '.[benchmarks]'
    python benchmarks/optim.py

Writes docs/speed.md, in about eight minutes. Every row is a ratio of two times taken in
turns in this process; absolute times are those of the core it happened to run on.
LibMTL is taken as it is on the package index (1.1.5).
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

# One core for both libraries, before either makes its threads.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation as peer
from optim_steps import CASES, LIBMTL, NUM_TASKS, OurSteps, TheirSteps

from mtl_jax import optim

ROOT = Path(__file__).parent.parent
TASK_COUNTS = (3, 8, 40)

METHODS: dict[str, tuple[Callable, Callable]] = {
    "pcgrad": (optim.pcgrad, lambda k: peer.PCGrad()),
    "gradvac": (optim.gradvac, lambda k: peer.GradVac()),
    "mgda": (optim.mgda, lambda k: peer.MGDA()),
    "cagrad": (lambda k: optim.cagrad(k, c=0.4), lambda k: peer.CAGrad(c=0.4)),
    "imtl_g": (optim.imtl_g, lambda k: peer.IMTLG()),
    "aligned_mtl": (optim.aligned_mtl, lambda k: peer.AlignedMTL()),
    "upgrad": (optim.upgrad, lambda k: peer.UPGrad()),
    "dualproj": (optim.dualproj, lambda k: peer.DualProj()),
    "conflict_free": (optim.conflict_free, lambda k: peer.ConFIG()),
    "pcd": (optim.pcd, lambda k: peer.PCD()),
    "fairgrad": (
        lambda k: optim.fairgrad(k, alpha=2.0),
        lambda k: peer.FairGrad(alpha=2.0),
    ),
    "nash_mtl": (optim.nash_mtl, lambda k: peer.NashMTL(n_tasks=k)),
}
"""Name -> (ours, TorchJD's), each made for a number of tasks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "speed.md")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Mapped backward passes are wrong in one JAX release.
    optim.check_task_gradients()
    packages = ("jax", "flax", "torch", "torchjd", "LibMTL")
    text = PAGE.format(
        machine=processor(),
        versions=", ".join(f"{name} {metadata.version(name)}" for name in packages),
        weights=weights_section(options.methods, options.rounds),
        steps=steps_section(options.methods, options.rounds),
    )
    options.output.write_text(text)
    print(f"wrote {options.output}")


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def in_turns(
    functions: dict[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, float]:
    """Median seconds of processor time a call of each function, measured in turns.

    Args:
      functions: Name -> what to time; it returns when the work is done.
      rounds: Turns that each gets.
      seconds: About how long a turn lasts, at least one call and at most 200.
    """
    calls = {}
    for name, function in functions.items():
        function()
        once = max(processor_time(function, 1), 1e-7)
        calls[name] = max(1, min(200, round(seconds / once)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(processor_time(function, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def processor_time(function: Callable[[], Any], calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - started) / calls


def weights_section(methods: Iterable[str], rounds: int) -> str:
    """The weights of a Gramian: the solver is what is timed."""
    rows, slower = [], []
    for name in methods:
        cells = [f"`{name}`"]
        for num_tasks in TASK_COUNTS:
            matrix = conflicting_rows(num_tasks)
            functions = {
                "ours": our_weights(name, matrix),
                "theirs": their_weights(name, matrix),
            }
            times = in_turns(functions, rounds, 0.02)
            ratio = times["theirs"] / times["ours"]
            cells.append(
                f"{1e3 * times['ours']:.3f} / {1e3 * times['theirs']:.3f} "
                f"(**{ratio:.1f}×**)"
            )
            if ratio < 1:
                slower.append(f"`{name}` at K = {num_tasks}")
        print(*cells, flush=True)
        rows.append(cells)
    header = ["method", *(f"K = {num_tasks}" for num_tasks in TASK_COUNTS)]
    return f"{table(header, rows)}\n\nSlower than TorchJD: {listed(slower)}."


def our_weights(name: str, matrix: np.ndarray) -> Callable[[], Any]:
    aggregator = METHODS[name][0](len(matrix))
    gradients = jnp.asarray(matrix)
    state = aggregator.init(gradients[0])
    # The state holds the weights; the sum that they weigh is compiled away.
    weigh = jax.jit(lambda gradients, state: aggregator.update(gradients, state)[1])
    return lambda: jax.block_until_ready(weigh(gradients, state))


def their_weights(name: str, matrix: np.ndarray) -> Callable[[], Any]:
    aggregator, gradients = METHODS[name][1](len(matrix)), torch.tensor(matrix)
    weigh = getattr(aggregator, "gramian_weighting", None)
    if weigh is None:
        return lambda: aggregator(gradients)
    gramian = gradients @ gradients.T
    return lambda: weigh(gramian)


def conflicting_rows(num_tasks: int) -> np.ndarray:
    """Task gradients of which about half the pairs conflict, float32."""
    rng = np.random.default_rng(num_tasks)
    rows = rng.normal(size=(num_tasks, 2 * num_tasks))
    rows *= np.geomspace(1, 10, num_tasks)[:, None]
    return rows.astype(np.float32)


def steps_section(methods: Iterable[str], rounds: int) -> str:
    """Whole training steps with three tasks, each over its own plain sum."""
    return "\n\n".join(case_section(name, methods, rounds) for name in CASES)


def case_section(case: str, methods: Iterable[str], rounds: int) -> str:
    ours, theirs = OurSteps(CASES[case]), TheirSteps(CASES[case])
    if ours.num_parameters != theirs.num_parameters:
        raise ValueError(
            f"the two {case}s have {ours.num_parameters} and {theirs.num_parameters} "
            "parameters; make them the same model."
        )
    means = mean_times(ours, theirs, rounds)
    timed = {name: method_times(name, ours, theirs, means, rounds) for name in methods}
    backward = 1 - means["forward"] / means["ours"]
    columns = ("parameters", "features", "TorchJD", "LibMTL")
    rows = [
        [f"`{name}`", *(multiple(*times.get(column, ())) for column in columns)]
        for name, times in timed.items()
    ]

    def over(times: dict[str, tuple[float, float]], column: str) -> float:
        return times[column][0] / times[column][1]

    def span(column: str) -> str:
        multiples = [over(times, column) for times in timed.values()]
        return f"{min(multiples):.2f} to {max(multiples):.2f}"

    def methods_with(condition: Callable[[dict], bool]) -> str:
        names = [f"`{name}`" for name, times in timed.items() if condition(times)]
        return "all" if len(names) == len(timed) else listed(names)

    return CASE.format(
        case=case,
        batch=CASES[case].batch,
        parameters=ours.num_parameters,
        ways=ways_table(means),
        table=table(
            ["method", "at parameters", "at features", "TorchJD", "LibMTL"], rows
        ),
        floor=1 + (NUM_TASKS - 1) * backward,
        forward=100 * (1 - backward),
        at_parameters=span("parameters"),
        at_features=span("features"),
        longer=methods_with(lambda times: times["parameters"][0] > times["TorchJD"][0]),
        larger=methods_with(
            lambda times: over(times, "parameters") > over(times, "TorchJD")
        ),
        twice=methods_with(lambda times: over(times, "parameters") > 2),
    )


def mean_times(ours: OurSteps, theirs: TheirSteps, rounds: int) -> dict[Any, float]:
    """Seconds of plain sums, of our forward pass, and of the mean done either way."""
    steps = {
        "ours": ours.plain(),
        "theirs": theirs.plain(),
        "forward": ours.forward(),
    }
    for together in (False, True):
        steps["ours", together] = ours.at_params(optim.mean, together)
        steps["theirs", together] = theirs.torchjd(peer.Mean(), together)
    return in_turns(steps, rounds, 0.1)


def method_times(
    name: str,
    ours: OurSteps,
    theirs: TheirSteps,
    means: dict[Any, float],
    rounds: int,
) -> dict[str, tuple[float, float]]:
    """Column -> seconds of a step and of its library's plain sum, in the same turns."""
    together = {
        library: means[library, True] < means[library, False]
        for library in ("ours", "theirs")
    }
    make, make_peer = METHODS[name]
    steps = {
        "ours": ours.plain(),
        "theirs": theirs.plain(),
        "parameters": ours.at_params(make, together["ours"]),
        "features": ours.at_features(make),
        "TorchJD": theirs.torchjd(make_peer(NUM_TASKS), together["theirs"]),
    }
    if name in LIBMTL:
        steps["LibMTL"] = theirs.libmtl(name)
    times = in_turns(steps, rounds, 0.1)
    plain = {"ours": times.pop("ours"), "theirs": times.pop("theirs")}
    own = ("parameters", "features")
    result = {
        column: (seconds, plain["ours" if column in own else "theirs"])
        for column, seconds in times.items()
    }
    print(name, {key: multiple(*pair) for key, pair in result.items()}, flush=True)
    return result


def ways_table(means: dict[Any, float]) -> str:
    rows = [
        [
            title,
            f"{1e3 * means[library]:.1f} ms",
            multiple(means[library, False], means[library]),
            multiple(means[library, True], means[library]),
        ]
        for title, library in (("mtl_jax", "ours"), ("TorchJD", "theirs"))
    ]
    return table(["mean", "plain sum", "one by one", "together"], rows)


def multiple(seconds: float | None = None, base: float = 1.0) -> str:
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.1f} ms (**{seconds / base:.2f}×**)"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGE = """# Speed of the methods

Written by `python benchmarks/optim.py` on one core ({machine}), with {versions}.
To repeat it, in the folder of the repository:

```bash
pip install -e '.[benchmarks]'
python benchmarks/optim.py
```

Both libraries run in one process, each with one thread on the same core, warm and in
turns. Times are processor time, the median over turns; a ratio compares two times of
the same turns, and is what carries over to another machine.

## Weights from a Gramian

Weighing `K` task gradients, about half of whose pairs conflict, in float32:
milliseconds with mtl_jax / with TorchJD, and how many times faster mtl_jax is. TorchJD
starts from the Gramian; mtl_jax starts from gradients of `2 K` numbers and computes the
Gramian as well, and so does TorchJD in `conflict_free` and `nash_mtl`, which it weighs
by the gradients alone. TorchJD's Nash-MTL begins where its last call ended, on the same
gradients. Random orders are drawn anew in every call.

{weights}

## Training steps

Three classification tasks with a shared trunk, the same model and batch in both
libraries: forward, backward, aggregation and an SGD update, in milliseconds and as a
multiple of the same library's plain sum of losses. TorchJD's step is `mtl_backward` and
`jac_to_grad`; LibMTL's goes through its weighting classes.

The three tasks can be pulled back through the trunk one by one (a loop over the
pullback; `parallel_chunk_size=1` in TorchJD) or together (`jax.vmap` of it; TorchJD's
default). The first table of each model has both for the mean; in the second, either
library goes the way that is faster there.

{steps}
"""

CASE = """### {case}, {parameters:,} parameters, batch {batch}

{ways}

{table}

Task gradients cost {at_parameters} times a plain sum at parameters, and
{at_features} times at features. The forward pass is {forward:.0f} % of the plain sum of
mtl_jax: with three backward passes for one, gradients at parameters cost {floor:.2f}
times as much, less what work the passes share.

- Longer at parameters than TorchJD: {longer}.
- A larger multiple at parameters than TorchJD's: {larger}.
- More than twice the plain sum at parameters: {twice}."""

if __name__ == "__main__":
    main()
