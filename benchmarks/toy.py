"""Descends the two objectives of CAGrad's toy problem, and draws docs/images/toy.png.

    python benchmarks/toy.py

Two valleys lead down to a Pareto set at the bottom. The walls between them are so steep
that the mean of the gradients stops halfway from two of the three starts.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from matplotlib import pyplot
from matplotlib.axes import Axes

from mtl_jax import optim

ROOT = Path(__file__).parent.parent
STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0))
NUM_STEPS = 30_000
LEARNING_RATE = 1e-3
# Both minima lie at this height, the Pareto set between them.
PARETO_SET = ((-7.0, -8.3552), (7.0, -8.3552))
# Neither objective falls below it; balancers take losses to be positive.
LOWEST = -21.0


class Descent(NamedTuple):
    """How a method turns a point into a direction.

    Attributes:
      init: `(x) -> state`.
      direction: `(x, state) -> (gradient, state)`.
      observe: `(x, state) -> state`, at the point that was reached.
    """

    init: Callable[[Array], Any]
    direction: Callable[[Array, Any], tuple[Array, Any]]
    observe: Callable[[Array, Any], Any] = lambda x, state: state


def objectives(x: Float[Array, " 2"]) -> Float[Array, " 2"]:
    """The two objectives of Liu et al. (2021), both to be minimised."""
    # Near x2 = 0 the upper half plane blends into the lower one.
    above = jnp.maximum(jnp.tanh(0.5 * x[1]), 0)
    below = jnp.maximum(jnp.tanh(-0.5 * x[1]), 0)
    bend = jnp.tanh(-x[1])
    walls = jnp.stack([0.5 * (-x[0] - 7) - bend, 0.5 * (-x[0] + 3) + bend + 2])
    logs = jnp.log(jnp.maximum(jnp.abs(walls), 5e-6)) + 6
    across = jnp.stack([-x[0] + 7, -x[0] - 7])
    bowls = (across**2 + 0.1 * (-x[1] - 8) ** 2) / 10 - 20
    return above * logs + below * bowls


def losses(x: Float[Array, " 2"]) -> Float[Array, " 2"]:
    """The objectives, shifted to be positive."""
    return objectives(x) - LOWEST


def aggregated(aggregator: optim.Aggregator, num_batches: int = 1) -> Descent:
    """Descends along what an aggregator makes of the Jacobian.

    A method that takes several batches gets the same Jacobian for each.
    """
    names = ("second", "third")[: num_batches - 1]

    def direction(x: Array, state: Any) -> tuple[Array, Any]:
        rows = jax.jacrev(objectives)(x)
        more = dict.fromkeys(names, rows)
        return aggregator.update(rows, state, x, losses=losses(x), **more)

    return Descent(aggregator.init, direction)


def balanced(balancer: optim.Balancer) -> Descent:
    """Descends along the weighted sum of the losses."""
    descent = aggregated(optim.from_balancer(balancer, 2))

    def observe(x: Array, state: Any) -> Any:
        if balancer.observe is None:
            return state
        return state._replace(memory=balancer.observe(losses(x), state.memory))

    return descent._replace(observe=observe)


# All parameters are shared: heads are empty.
TASK_LOSSES = {
    "first": lambda x, head: losses(x)[0],
    "second": lambda x, head: losses(x)[1],
}
HEADS = {"first": (), "second": ()}


def flat(aggregator: optim.Aggregator, rho: float) -> Descent:
    """Descends into task-based flat regions."""
    evaluate = optim.flat_value_and_grad(TASK_LOSSES, aggregator, rho)

    def direction(x: Array, state: Any) -> tuple[Array, Any]:
        _, (gradient, _), state = evaluate(x, HEADS, state)
        return gradient, state

    return Descent(optim.flat_regions(aggregator).init, direction)


def samo(aggregator: optim.Aggregator, rho: float) -> Descent:
    """Descends by SAMO, whose key is kept in the state."""
    evaluate = optim.samo(TASK_LOSSES, aggregator, rho)

    def init(x: Array) -> Any:
        return jax.random.key(0), aggregator.init(x)

    def direction(x: Array, state: Any) -> tuple[Array, Any]:
        key, state = state
        key, draw = jax.random.split(key)
        _, (gradient, _), state = evaluate(x, HEADS, state, draw)
        return gradient, (key, state)

    return Descent(init, direction)


def sharp(wrap: Callable[..., Any], rho: float) -> Descent:
    """Descends along a sharpness-aware gradient of the sum."""
    value_and_grad = wrap(jax.value_and_grad(lambda x: jnp.sum(losses(x))), rho)
    return Descent(lambda x: (), lambda x, state: (value_and_grad(x)[1], state))


METHODS: Mapping[str, Descent] = {
    "sum": aggregated(optim.sum(2)),
    "random": aggregated(optim.random(2)),
    "pcgrad": aggregated(optim.pcgrad(2)),
    "gradvac": aggregated(optim.gradvac(2)),
    "mgda": aggregated(optim.mgda(2)),
    "mgda_frank_wolfe": aggregated(optim.mgda_frank_wolfe(2)),
    "mgda, l2": aggregated(optim.normalize(optim.mgda(2), "l2")),
    "cagrad, c = 0.5": aggregated(optim.cagrad(2, c=0.5)),
    "nash_mtl": aggregated(optim.nash_mtl(2)),
    "fairgrad, alpha = 2": aggregated(optim.fairgrad(2)),
    "imtl_g": aggregated(optim.imtl_g(2)),
    "conflict_free": aggregated(optim.conflict_free(2)),
    "aligned_mtl": aggregated(optim.aligned_mtl(2)),
    "upgrad": aggregated(optim.upgrad(2)),
    "dualproj": aggregated(optim.dualproj(2)),
    "ntkmtl": aggregated(optim.ntkmtl(2)),
    "pcd": aggregated(optim.pcd(2)),
    "gradnorm": aggregated(optim.gradnorm(2)),
    "sdmgrad": aggregated(optim.sdmgrad(2), num_batches=3),
    "modo": aggregated(optim.modo(2), num_batches=3),
    "moco": aggregated(optim.moco(2)),
    "graddrop": aggregated(optim.graddrop(2)),
    "db_mtl": aggregated(optim.db_mtl(2)),
    "excess_mtl": aggregated(optim.excess_mtl(2)),
    "uncertainty": balanced(optim.uncertainty(2)),
    "uw_so": balanced(optim.uw_so(2)),
    "awl": balanced(optim.awl(2)),
    "imtl_l": balanced(optim.imtl_l(2)),
    "dwa": balanced(optim.dwa(2)),
    "rlw": balanced(optim.rlw(2)),
    "gls": balanced(optim.gls(2)),
    "scale_invariant": balanced(optim.scale_invariant(2)),
    "stch": balanced(optim.stch(2, warmup_steps=NUM_STEPS // 10)),
    "famo": balanced(optim.famo(2)),
    "task_prioritization": balanced(optim.task_prioritization(2)),
    "sharpness_aware": sharp(optim.sharpness_aware, 0.1),
    "gsam": sharp(optim.gsam, 0.1),
    "flat regions, cagrad": flat(optim.cagrad(2, c=0.5), 0.1),
    "samo, cagrad": samo(optim.cagrad(2, c=0.5), 0.1),
}


def descend(
    descent: Descent, starts: Float[Array, "starts 2"], num_steps: int, every: int = 100
) -> Float[Array, "starts points 2"]:
    """Follows Adam from each start.

    Args:
      descent: Makes the gradients.
      starts: Where to begin; their dtype is computed in.
      num_steps: Number of updates, a multiple of ``every``.
      every: How many updates lie between the points that are returned.

    Returns:
      The points passed, the start and the end among them.
    """
    optimizer = optax.adam(LEARNING_RATE)

    def step(carry, _):
        x, state, moments = carry
        gradient, state = descent.direction(x, state)
        update, moments = optimizer.update(gradient, moments, x)
        x = x + jnp.asarray(update)
        return (x, descent.observe(x, state), moments), None

    def stretch(carry, _):
        carry, _ = jax.lax.scan(step, carry, length=every)
        return carry, carry[0]

    def walk(start):
        carry = start, descent.init(start), optimizer.init(start)
        _, points = jax.lax.scan(stretch, carry, length=num_steps // every)
        return jnp.concatenate([start[None], points])

    return jax.jit(jax.vmap(walk))(starts)


def draw(paths: Mapping[str, np.ndarray], file: Path, columns: int = 5) -> None:
    """Draws a map of the mean objective for each method, with its paths.

    Args:
      paths: Method -> points passed from each start.
      file: Where to write the picture.
      columns: Maps in a row.
    """
    grid = np.linspace(-10.5, 10.5, 400)
    across, along = np.meshgrid(grid, grid)
    points = jnp.stack([across.ravel(), along.ravel()], axis=-1)
    mean = jax.jit(jax.vmap(objectives))(points).mean(axis=-1).reshape(across.shape)
    # Levels by rank: walls and bowl differ too much in depth for even ones.
    levels = np.quantile(mean, np.linspace(0, 1, 25))
    shades = pyplot.get_cmap("Greys")(np.linspace(0.55, 0.0, len(levels) - 1))
    rows = math.ceil((len(paths) + 1) / columns)
    figure, panels = pyplot.subplots(
        rows,
        columns,
        figsize=(2 * columns, 2.15 * rows),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    panels = panels.ravel()
    for panel, (name, trails) in zip(panels, paths.items(), strict=False):
        panel.contourf(across, along, mean, levels=levels, colors=shades)
        draw_paths(panel, trails)
        panel.set_title(name, fontsize=10)
        panel.set(xticks=(-10, 0, 10), yticks=(-10, 0, 10), aspect="equal")
        panel.tick_params(labelsize=8, length=2)
    for panel in panels[len(paths) :]:
        panel.axis("off")
    for panel in panels[len(paths) - columns : len(paths)]:
        panel.tick_params(labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[len(paths)].legend(handles, labels, loc="center", fontsize=10, frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_paths(panel: Axes, trails: np.ndarray) -> None:
    """Draws the Pareto set, and a line from each start to where it led."""
    ends_across, ends_along = zip(*PARETO_SET, strict=True)
    panel.plot(ends_across, ends_along, "black", linewidth=4, label="Pareto set")
    for k, color in enumerate(("tab:red", "tab:blue", "tab:orange")):
        across, along = trails[k].T
        ring = {"markeredgecolor": color, "markerfacecolor": "white"}
        disc = {"markeredgecolor": "black", "markerfacecolor": color}
        labels = ("start", "end") if k == 0 else (None, None)
        panel.plot(across, along, color=color, linewidth=1.6)
        panel.plot(across[0], along[0], "o", markersize=4.5, **ring, label=labels[0])
        panel.plot(across[-1], along[-1], "o", markersize=5.5, **disc, label=labels[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "images" / "toy.png"
    )
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    starts = jnp.array(STARTS)
    paths = {}
    for name, descent in METHODS.items():
        paths[name] = np.asarray(descend(descent, starts, NUM_STEPS))
        ends = ", ".join(f"({x:.2f}, {y:.2f})" for x, y in paths[name][:, -1])
        print(f"{name:24} {ends}", flush=True)
    draw(paths, options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
