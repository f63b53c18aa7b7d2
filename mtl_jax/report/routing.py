"""Which expert each patch of a test image goes to, by task and layer."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mtl_jax.report.curves import PALETTE, STYLE, shortened
from mtl_jax.report.images import Image, figure_image
from mtl_jax.report.run_folder import Run
from mtl_jax.report.tiles import sampled_images

MAX_IMAGES = 3
MAX_TASKS = 8
MAX_LAYERS = 6
MAX_LEGEND = 32
MAX_EXPERTS = 2**16
EXPERT_SHARE = 0.72
"""How much of a patch's colour is its expert's; the rest is the image in grey."""


def routed_images(run: Run) -> list[tuple[str, list[Image]]]:
    """Test images with the first expert of each patch in colour.

    Args:
      run: A run; ``source/routing/task/layer`` of its samples is int
        ``[examples, rows, columns]``, with the task ``all`` where routers do not tell
        tasks apart.

    Returns:
      For each source with routed patches its name and the images.

    Raises:
      ValueError: If an array does not fit the images.
    """
    found = []
    for source in run.result["sources"]:
        routing = _routing(run, source)
        if routing:
            images = sampled_images(run, source)
            shown = [
                _image(source, number, image, routing)
                for number, image in enumerate(images[:MAX_IMAGES])
            ]
            found.append((source, shown))
    return found


def _routing(run: Run, source: str) -> dict[str, dict[str, np.ndarray]]:
    """Task -> layer -> experts, for what is shown."""
    prefix = f"{source}/routing/"
    by_task: dict[str, dict[str, np.ndarray]] = {}
    for name, experts in run.samples.items():
        task, _, layer = name.removeprefix(prefix).partition("/")
        if not name.startswith(prefix) or not layer:
            continue
        images = run.samples.get(f"{source}/image")
        if (
            images is None
            or experts.ndim != 3
            or len(experts) != len(images)
            or not np.issubdtype(experts.dtype, np.integer)
            or 0 in experts.shape[1:]
            or np.any((experts < 0) | (experts >= MAX_EXPERTS))
        ):
            raise ValueError(
                f"{run.path / 'samples.npz'}: {name!r} is {experts.dtype} "
                f"{experts.shape}: it must be experts, from 0 and less than "
                f"{MAX_EXPERTS:,}, of [examples, rows, columns] of patches, with as "
                f"many examples as '{source}/image'."
            )
        by_task.setdefault(task, {})[layer] = experts.astype(np.int64)
    tasks = list(by_task)[:MAX_TASKS]
    layers = _spread(list(by_task[tasks[0]]), MAX_LAYERS) if tasks else []
    return {
        task: {
            layer: by_task[task][layer] for layer in layers if layer in by_task[task]
        }
        for task in tasks
    }


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many of the names, evenly spread from the first to the last."""
    if len(names) <= most:
        return names
    places = np.linspace(0, len(names) - 1, most).round().astype(int)
    return [names[place] for place in places]


def expert_colors(num_experts: int) -> np.ndarray:
    """A colour for each expert, told apart as well as their number allows.

    Args:
      num_experts: How many.

    Returns:
      Floats ``[experts, 3]`` in [0, 1].
    """
    if num_experts <= len(PALETTE):
        return np.array([to_rgb(color) for color in PALETTE[:num_experts]])
    # Without the two greys: the image under the patches is grey.
    pairs = np.delete(matplotlib.colormaps["tab20"](np.arange(20)), (14, 15), axis=0)
    if num_experts <= len(pairs):
        return pairs[:num_experts, :3]
    hues = matplotlib.colormaps["hsv"](np.arange(num_experts) / num_experts)
    # Neighbours on the circle of hues differ in brightness.
    shade = np.array([1.0, 0.62, 0.82])[np.arange(num_experts) % 3]
    return hues[:, :3] * shade[:, None]


def _image(
    source: str,
    number: int,
    image: np.ndarray,
    routing: Mapping[str, Mapping[str, np.ndarray]],
) -> Image:
    """One test image, and for each task and layer the same in the experts' colours."""
    layers = list(next(iter(routing.values())))
    experts = {
        task: {layer: choices[number] for layer, choices in by_layer.items()}
        for task, by_layer in routing.items()
    }
    used = np.unique([choice for by in experts.values() for choice in by.values()])
    colors = expert_colors(max(int(choice.max()) for choice in _all(routing)) + 1)
    legend = used[:MAX_LEGEND]
    rows, columns = len(experts), len(layers)
    size = (1.35 * (columns + 1) + 1.5, 1.3 * rows + 0.9)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns + 1, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        _show(grid[0, 0], np.repeat(image, 3 // image.shape[-1], axis=-1), "input")
        for row, (task, by_layer) in enumerate(experts.items()):
            label = "all tasks" if task == "all" else shortened(task, 14)
            for column, layer in enumerate(layers, start=1):
                axes = grid[row, column]
                title = shortened(layer, 14) if row == 0 else ""
                _show(axes, colored_patches(image, by_layer[layer], colors), title)
                if column == 1:
                    axes.text(
                        *(-0.08, 0.5),
                        label,
                        transform=axes.transAxes,
                        rotation=90,
                        ha="right",
                        va="center",
                    )
        figure.legend(
            handles=[Patch(color=tuple(colors[e]), label=str(e)) for e in legend],
            title="expert",
            loc="outside right upper",
            ncols=1 if len(legend) <= 16 else 2,
        )
        return figure_image(figure, _spoken(source, number, experts))


def _all(routing: Mapping[str, Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    return [choices for by_layer in routing.values() for choices in by_layer.values()]


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title, loc="center", fontsize=9)


def colored_patches(
    image: np.ndarray, experts: np.ndarray, colors: np.ndarray
) -> np.ndarray:
    """The image in grey under the colours of its patches' experts.

    Args:
      image: uint8 ``[height, width, channels]``.
      experts: int ``[rows, columns]``.
      colors: Of each expert.

    Returns:
      Floats ``[height, width, 3]`` in [0, 1].
    """
    height, width, _ = image.shape
    rows = np.arange(height) * experts.shape[0] // height
    columns = np.arange(width) * experts.shape[1] // width
    patches = colors[experts[rows[:, None], columns]]
    grey = image.mean(axis=-1, keepdims=True) / 255
    return EXPERT_SHARE * patches + (1 - EXPERT_SHARE) * grey


def _spoken(
    source: str, number: int, experts: Mapping[str, Mapping[str, np.ndarray]]
) -> str:
    parts = []
    for task, by_layer in experts.items():
        for layer, choices in by_layer.items():
            names, counts = np.unique(choices, return_counts=True)
            most = int(names[counts.argmax()])
            parts.append(
                f"{task} in {layer}: {len(names)} experts, most patches "
                f"({counts.max() / choices.size:.0%}) to {most}"
            )
    return (
        f"First expert of each patch of {source} test example {number + 1}. "
        + "; ".join(parts)
        + "."
    )
