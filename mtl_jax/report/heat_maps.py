"""Heat maps: how tasks' gradients agree, and which experts each task uses."""

import itertools

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from mtl_jax.report.curves import STYLE, binned, shortened
from mtl_jax.report.images import Image, figure_image
from mtl_jax.report.run_folder import Run

# Purple against orange is told apart with any common colour blindness.
DIVERGING = "PuOr_r"
SEQUENTIAL = "Blues"
MAX_COLUMNS = 120
MAX_PAIRS = 24
MAX_ANNOTATED = 10
FINAL_FRACTION = 0.1


def cosine_images(run: Run) -> list[Image]:
    """Cosines between task gradients: their mean, and their course over training.

    Args:
      run: A run; ``all/cosine`` is ``[tasks, tasks]``, null where a task is inactive.

    Returns:
      Two images, or none for fewer than two tasks or where no cosine was logged.

    Raises:
      ValueError: If the logged matrices don't fit the tasks.
    """
    tasks = run.tasks
    steps, cosines = run.series("all/cosine")
    if len(tasks) < 2 or len(steps) == 0:
        return []
    if cosines.shape[1:] != (len(tasks), len(tasks)):
        raise ValueError(
            f"{run.path / 'metrics.jsonl'}: 'all/cosine' has shape {cosines.shape[1:]} "
            f"for {len(tasks)} tasks: the file is another run's or damaged."
        )
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    rows, columns = np.array(pairs).T
    pair_cosines = cosines[:, rows, columns]
    short = [shortened(task, 16) for task in tasks]
    names = [f"{short[row]} · {short[column]}" for row, column in pairs]
    mean = _nanmean(pair_cosines)
    conflict = _nanmean(np.where(np.isnan(pair_cosines), np.nan, pair_cosines < 0))
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    shares = matrix.copy()
    matrix[rows, columns] = matrix[columns, rows] = mean
    shares[rows, columns] = shares[columns, rows] = conflict
    strongest = np.sort(np.argsort(-np.abs(np.nan_to_num(mean)))[:MAX_PAIRS])
    return [
        _mean_cosine_image(tasks, matrix, shares, names, mean),
        _cosine_course_image(
            steps, pair_cosines[:, strongest], [names[pair] for pair in strongest]
        ),
    ]


def expert_images(run: Run) -> list[Image]:
    """Which share of each task's tokens goes to which expert, one image a layer.

    The mean over the last tenth of the logged steps is shown, each row summing to one.

    Args:
      run: A run; ``<task>/expert_load/<block>`` is ``[experts]``.

    Returns:
      One image for each layer with experts, in the order logged; none for a dense
      trunk.
    """
    loads: dict[str, dict[str, np.ndarray]] = {}
    for task in run.tasks:
        prefix = f"{task}/expert_load/"
        for name in run.names(prefix):
            _, values = run.series(name)
            if values.ndim == 2:
                final = _nanmean(values[-max(1, int(len(values) * FINAL_FRACTION)) :])
                block = loads.setdefault(name.removeprefix(prefix), {})
                block[task] = final / max(float(np.nansum(final)), 1e-12)
    high = max(
        (load.max() for block in loads.values() for load in block.values()), default=1
    )
    return [
        _expert_image(block, by_task, float(high)) for block, by_task in loads.items()
    ]


def _mean_cosine_image(
    tasks: tuple[str, ...],
    matrix: np.ndarray,
    shares: np.ndarray,
    names: list[str],
    mean: np.ndarray,
) -> Image:
    """The task-by-task matrix of mean cosines, annotated with conflict shares."""
    limit = _symmetric_limit(matrix)
    annotated = len(tasks) <= MAX_ANNOTATED
    size = 1.4 + min(0.54 * len(tasks), 5.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size, size - 0.3), layout="constrained")
        axes = figure.add_subplot(title="mean over training")
        image = axes.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit)
        _name_cells(axes, tasks, tasks)
        for row, column in np.argwhere(np.isfinite(matrix)) if annotated else ():
            value = matrix[row, column]
            text = f"{value:+.2f}\n{shares[row, column]:.0%}".replace("-", "−")
            color = "white" if abs(value) > 0.62 * limit else "black"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8, color=color
            )
        if not annotated:
            figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
        spoken = ", ".join(
            f"{name} {value:+.2f}" for name, value in zip(names, mean, strict=True)
        )
        return figure_image(
            figure,
            f"Heat map of the mean cosine between task gradients: {spoken}.",
            "Mean cosine of each pair of task gradients; purple below zero, orange "
            "above."
            + (
                " The percentage is the share of steps in which the pair conflicts."
                if annotated
                else ""
            ),
        )


def _cosine_course_image(
    steps: np.ndarray, pair_cosines: np.ndarray, names: list[str]
) -> Image:
    """Step by pair: how each pair's cosine moves during training."""
    centres, values = binned(steps, pair_cosines, MAX_COLUMNS)
    limit = _symmetric_limit(values)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 1.3 + 0.3 * len(names)), layout="constrained")
        axes = figure.add_subplot(title="over training", xlabel="step")
        image = axes.pcolormesh(
            np.append(steps[0] - 1, centres)
            if len(centres) > 1
            else [0, centres[0] + 1],
            np.arange(len(names) + 1) - 0.5,
            np.ma.masked_invalid(values.T),
            cmap=DIVERGING,
            vmin=-limit,
            vmax=limit,
        )
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_facecolor("#e6e6e6")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.colorbar(image, ax=axes, label="cosine")
        return figure_image(
            figure,
            f"Heat strip of the cosine of {len(names)} pairs of task gradients over "
            f"steps {steps[0]:,} to {steps[-1]:,}; purple below zero, orange above.",
            "The same cosines step by step. Purple: the pair conflicts; orange: it "
            "agrees; grey: one of the two tasks had no label."
            + (
                f" Shown are the {MAX_PAIRS} pairs with the largest mean."
                if len(names) == MAX_PAIRS
                else ""
            ),
        )


def _expert_image(block: str, by_task: dict[str, np.ndarray], high: float) -> Image:
    """One layer's matrix of tasks by experts."""
    tasks = tuple(by_task)
    loads = np.stack([by_task[task] for task in tasks])
    num_experts = loads.shape[1]
    annotated = num_experts <= 8
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(4.4, 1.25 + min(0.34 * len(tasks), 5.0)), layout="constrained"
        )
        axes = figure.add_subplot(title=shortened(block, 44), xlabel="expert")
        image = axes.imshow(loads, cmap=SEQUENTIAL, vmin=0, vmax=high, aspect="auto")
        experts = tuple(map(str, range(num_experts)))
        _name_cells(axes, tasks, experts, tilted=False)
        if not annotated:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for row, column in np.argwhere(np.isfinite(loads)) if annotated else ():
            share = loads[row, column]
            color = "white" if share > 0.55 * high else "black"
            axes.text(
                column,
                row,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color=color,
            )
        figure.colorbar(image, ax=axes, label="share", pad=0.02)
        favourites = ", ".join(
            f"{task} {int(load.argmax())} ({load.max():.0%})"
            for task, load in by_task.items()
        )
        return figure_image(
            figure,
            f"Heat map of expert use by task in {block}, {num_experts} experts. Most "
            f"used: {favourites}.",
        )


def _name_cells(
    axes: Axes, rows: tuple[str, ...], columns: tuple[str, ...], tilted: bool = True
) -> None:
    """Labels a matrix's rows and columns and draws white lines between its cells."""
    rotation = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    size = 9 if len(rows) <= 16 else 6
    for set_ticks, names, style in (
        (axes.set_xticks, columns, rotation if tilted else {}),
        (axes.set_yticks, rows, {}),
    ):
        labels = [shortened(name, 16) for name in names]
        set_ticks(range(len(names)), labels, fontsize=size, **style)
    axes.xaxis.set_minor_locator(
        FixedLocator([n - 0.5 for n in range(1, len(columns))])
    )
    axes.yaxis.set_minor_locator(FixedLocator([n - 0.5 for n in range(1, len(rows))]))
    axes.grid(False)
    axes.grid(which="minor", color="white", linewidth=24 / max(16, len(columns)))
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _symmetric_limit(values: np.ndarray) -> float:
    """A colour limit around zero: the largest magnitude, rounded up to a tenth."""
    finite = np.abs(values[np.isfinite(values)])
    return max(0.1, float(np.ceil(10 * finite.max(initial=0)) / 10))


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is left."""
    counts = (~np.isnan(values)).sum(axis=0)
    total = np.nansum(values, axis=0)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
