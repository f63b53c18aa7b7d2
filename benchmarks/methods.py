"""Trains small networks with every method, and writes docs/results_methods.md.

    python benchmarks/methods.py --runs runs/methods

Two data sets, one small convolutional trunk with a head a task. Every method, the plain
sum and the single-task networks included, chooses among the same learning rates by a
validation part of the training data, and is then tested with three seeds. What is done
is not repeated, so it can be stopped and started again. `--smoke` runs everything for a
few steps and writes no page.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from method_rules import (
    Rule,
    RuleMaker,
    at_features,
    at_params,
    balanced,
    flat,
    saliency_regularized,
    samo,
    sharp,
)
from methods_page import chosen, page
from small_problems import Problem, earth_tiles, multi_mnist

from mtl_jax import optim
from mtl_jax.report import delta_m_tasks

ROOT = Path(__file__).parent.parent
PROBLEMS = {"multi_mnist": multi_mnist, "earth": earth_tiles}
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
WARMUP = 0.05
BASELINE = "sum"


class Method(NamedTuple):
    """A method under test.

    Attributes:
      kind: What it looks at.
      rule: Makes its gradients for a problem.
    """

    kind: str
    rule: RuleMaker


def _gramian(make, num_batches=1):
    return Method("Gramian", at_params(make, num_batches))


def _rows(make):
    return Method("rows", at_params(make))


def _losses(make):
    return Method("losses", balanced(make))


def _features(make):
    return Method("features", at_features(make))


def _sharpness(rule):
    return Method("sharpness", rule)


# The hyperparameters are the published defaults; the learning rate alone is tuned.
# Adam does not see the length of the direction, so that the mean would repeat the sum.
METHODS: dict[str, Method] = {
    BASELINE: _losses(optim.equal),
    "random": _gramian(optim.random),
    "pcgrad": _gramian(optim.pcgrad),
    "gradvac": _gramian(optim.gradvac),
    "gradvac_by_layer": _gramian(
        lambda k: optim.grouped(optim.gradvac, k, r"([^/]+)/(?:kernel|bias)$")
    ),
    "mgda": _gramian(optim.mgda),
    "mgda_frank_wolfe": _gramian(optim.mgda_frank_wolfe),
    "mgda_normalized": _gramian(lambda k: optim.normalize(optim.mgda(k), "l2")),
    "cagrad": _gramian(optim.cagrad),
    "cagrad_momentum": _gramian(lambda k: optim.momentum(optim.cagrad(k))),
    "nash_mtl": _gramian(optim.nash_mtl),
    "nash_mtl_every_10": _gramian(lambda k: optim.every(optim.nash_mtl(k), 10)),
    "fairgrad": _gramian(optim.fairgrad),
    "imtl_g": _gramian(optim.imtl_g),
    "conflict_free": _gramian(optim.conflict_free),
    "aligned_mtl": _gramian(optim.aligned_mtl),
    "upgrad": _gramian(optim.upgrad),
    "dualproj": _gramian(optim.dualproj),
    "ntkmtl": _gramian(optim.ntkmtl),
    "pcd": _gramian(optim.pcd),
    "gradnorm": _gramian(optim.gradnorm),
    "sdmgrad": _gramian(optim.sdmgrad, num_batches=3),
    "modo": _gramian(optim.modo, num_batches=3),
    "moco": _rows(optim.moco),
    "graddrop": _rows(optim.graddrop),
    "db_mtl": _rows(optim.db_mtl),
    "excess_mtl": _rows(optim.excess_mtl),
    "trimmed_mean": _rows(optim.trimmed_mean),
    "uncertainty": _losses(optim.uncertainty),
    "uw_so": _losses(optim.uw_so),
    "awl": _losses(optim.awl),
    "imtl_l": _losses(optim.imtl_l),
    "dwa": _losses(optim.dwa),
    "rlw": _losses(optim.rlw),
    "gls": _losses(optim.gls),
    "scale_invariant": _losses(optim.scale_invariant),
    "stch": _losses(lambda k: optim.stch(k, warmup_steps=50)),
    "famo": _losses(optim.famo),
    "task_prioritization": _losses(optim.task_prioritization),
    "mgda_ub": _features(optim.mgda),
    "aligned_mtl_ub": _features(optim.aligned_mtl),
    "upgrad_ub": _features(optim.upgrad),
    "graddrop_ub": _features(optim.graddrop),
    "rep_mtl": Method("features", saliency_regularized),
    "sam": _sharpness(sharp(optim.sharpness_aware, rho=0.05)),
    "asam": _sharpness(sharp(optim.sharpness_aware, rho=0.5, adaptive=True)),
    "gsam": _sharpness(sharp(optim.gsam, rho=0.05)),
    "flat_sum": _sharpness(flat(optim.sum, rho=0.05)),
    "flat_cagrad": _sharpness(flat(optim.cagrad, rho=0.05)),
    "samo_cagrad": _sharpness(samo(optim.cagrad, rho=0.05)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--data", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--smoke", action="store_true", help="three steps, no page")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "results_methods.md"
    )
    options = parser.parse_args()
    # One thread, so that CPU seconds are seconds and steps can be compared.
    flags = ["--xla_cpu_multi_thread_eigen=false"]
    if options.smoke:
        flags.append("--xla_backend_optimization_level=0")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    runs = options.runs / "smoke" if options.smoke else options.runs
    names = list(dict.fromkeys([BASELINE, *options.methods]))
    results = {}
    for data in options.data:
        problem = PROBLEMS[data]()
        if options.smoke:
            problem = dataclasses.replace(problem, num_steps=3, batch_size=4)
        results[data] = measure(problem, names, runs / data)
    if not options.smoke:
        kinds = {name: METHODS[name].kind for name in names}
        options.output.write_text(page(results, kinds, BASELINE))
        print(f"wrote {options.output}")


def measure(problem: Problem, names: list[str], folder: Path) -> dict[str, Any]:
    """Every method on one problem, and each task alone.

    Returns:
      ``{"problem": ..., "single": {task: record}, "methods": {name: record}}``, each
      record as `measure_method` makes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    single = {}
    for task in problem.tasks:
        alone = dataclasses.replace(problem, tasks=(task,))
        single[task.name] = measure_method(
            alone, METHODS[BASELINE], {task.name: 1.0}, folder / f"{task.name}.json"
        )
    # Single-task scores are needed first: learning rates are chosen by delta-m.
    references = {
        name: chosen(record)[0]["valid"][name] for name, record in single.items()
    }
    methods = {
        name: measure_method(
            problem, METHODS[name], references, folder / f"{name}.json"
        )
        for name in names
    }
    return {"problem": describe(problem), "single": single, "methods": methods}


def describe(problem: Problem) -> dict[str, Any]:
    """What a page or a later run must know of a problem."""
    return {
        "name": problem.name,
        "tasks": {
            task.name: [task.metrics[0].name, task.metrics[0].higher_is_better]
            for task in problem.tasks
        },
        "num_steps": problem.num_steps,
        "batch_size": problem.batch_size,
        "examples": {
            split: len(arrays["image"]) for split, arrays in problem.splits.items()
        },
        "learning_rates": LEARNING_RATES,
        "seeds": SEEDS,
    }


def measure_method(
    problem: Problem, method: Method, references: Mapping[str, float], file: Path
) -> dict[str, Any]:
    """Tunes one method, trains it with every seed, and keeps the record in a file.

    Args:
      problem: What to learn.
      method: How.
      references: Task -> the validation score that gains are relative to.
      file: Where the record is, or will be.

    Returns:
      The record: ``runs`` (learning rate, seed, scores by task on ``valid`` and
      ``test``, seconds of training), ``best`` (the learning rate chosen), and what it
      all took: ``cpu_seconds``, with ``compile_seconds`` in it.

    Raises:
      ValueError: If the file holds a record made with other settings.
    """
    settings = json.loads(json.dumps(describe(problem)))
    if file.exists():
        record = json.loads(file.read_text())
        if record["settings"] != settings:
            raise ValueError(f"{file} was made with other settings; remove it.")
        return record
    began = time.process_time()
    init = _compiled_init(problem)
    arrays = problem.splits["train"]
    train = jax.jit(training(problem, method.rule(problem)))
    train = train.lower(init(jax.random.key(0)), arrays, 1.0, 0).compile()
    compile_seconds = time.process_time() - began

    def run(learning_rate: float, seed: int) -> dict[str, Any]:
        params = jax.block_until_ready(init(jax.random.key(seed)))
        start = time.process_time()
        params = jax.block_until_ready(train(params, arrays, learning_rate, seed))
        seconds = time.process_time() - start
        return {
            "learning_rate": learning_rate,
            "seed": seed,
            "cpu_seconds": seconds,
            "valid": scores(problem, params, "valid"),
            "test": scores(problem, params, "test"),
        }

    def gain(run: Mapping[str, Any]) -> float:
        return total_gain(problem, run["valid"], references)

    runs = [run(learning_rate, SEEDS[0]) for learning_rate in LEARNING_RATES]
    best = max(runs, key=gain)["learning_rate"]
    runs += [run(best, seed) for seed in SEEDS[1:]]
    total = time.process_time() - began
    record = {
        "settings": settings,
        "best": best,
        "compile_seconds": compile_seconds,
        "cpu_seconds": total,
        "runs": runs,
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    partial.rename(file)
    print(f"{problem.name} {file.stem}: {total:.0f} s", flush=True)
    return record


def total_gain(
    problem: Problem, scores: Mapping[str, float], references: Mapping[str, float]
) -> float:
    """Delta-m over tasks; minus infinity for a run that diverged."""
    names = [task.name for task in problem.tasks]
    values = [scores[name] for name in names]
    if not all(map(math.isfinite, values)):
        return -math.inf
    higher = [task.metrics[0].higher_is_better for task in problem.tasks]
    return delta_m_tasks(values, [references[name] for name in names], higher, names)


def training(problem: Problem, rule: Rule) -> Callable[..., PyTree]:
    """A whole run: ``(params, arrays, learning_rate, seed) -> params``."""
    optimizer = optax.scale_by_adam()
    num_steps = problem.num_steps

    def rate(step: Array) -> Array:
        cosine = 0.5 * (1 + jnp.cos(math.pi * step / num_steps))
        return jnp.minimum((step + 1) / (WARMUP * num_steps), 1) * cosine

    def train(params: PyTree, arrays: Mapping[str, Array], learning_rate, seed):
        data_key, step_key = jax.random.split(jax.random.key(seed))
        # The first batch of a step is the same for methods that draw one or three.
        draws = [
            jax.random.randint(
                jax.random.fold_in(data_key, number),
                (num_steps, problem.batch_size),
                0,
                len(arrays["image"]),
            )
            for number in range(rule.num_batches)
        ]

        def batch(indices: Array) -> dict[str, Array]:
            return {name: array[indices] for name, array in arrays.items()}

        def step(carry, inputs):
            params, state, moments = carry
            number, indices, key = inputs
            batches = [batch(drawn) for drawn in indices]
            gradient, state = rule.gradient(params, state, batches, key)
            updates, moments = optimizer.update(gradient, moments)
            scale = -learning_rate * rate(number)
            params = optax.apply_updates(
                params, jax.tree.map(lambda leaf: scale * leaf, updates)
            )
            return (params, rule.observe(params, state, batches[0]), moments), None

        state = rule.init(params, batch(draws[0][0]))
        numbers = jnp.arange(num_steps, dtype=jnp.float32)
        inputs = numbers, draws, jax.random.split(step_key, num_steps)
        carry = params, state, optimizer.init(params)
        return jax.lax.scan(step, carry, inputs)[0][0]

    return train


def scores(problem: Problem, params: PyTree, split: str) -> dict[str, float]:
    """The first metric of every task."""
    sums = jax.device_get(_compiled_sums(problem)(params, problem.splits[split]))
    return {
        task.name: task.metrics[0].compute(sums[task.name]) for task in problem.tasks
    }


@functools.cache
def _compiled_init(problem: Problem) -> Callable[..., PyTree]:
    return jax.jit(problem.init)


@functools.cache
def _compiled_sums(problem: Problem) -> Callable[..., Any]:
    """``(params, arrays) -> {task: sums}`` of each task's first metric."""

    def sums(params: Mapping[str, PyTree], arrays: Mapping[str, Array]):
        features = problem.features(params["trunk"], arrays)
        present = jnp.ones(len(features), bool)
        return {
            task.name: task.metrics[0].update(
                task.head.apply(params["heads"][task.name], features),
                arrays[task.name],
                present,
            )
            for task in problem.tasks
        }

    return jax.jit(sums)


if __name__ == "__main__":
    main()
