"""The largest batch that fits, with and without recomputation."""

import dataclasses
import math
from collections.abc import Iterator

from mtl_jax.scaling.compile import Estimate, OutOfMemoryError, estimate
from mtl_jax.scaling.topology import Topology
from mtl_jax.sharding import make_mesh
from mtl_jax.sharding.expert_parallel import BATCH_AXES
from mtl_jax.train import Experiment

MOST_EXAMPLES = 2**14
"""Examples a chip at which the search ends."""

PRECISION = 1 / 16
"""The largest batch is found up to this part of it."""


def search(
    experiment: Experiment, topology: Topology, *, optimized: bool = True
) -> Estimate:
    """Finds the largest batch that fits, and whether to recompute blocks for it.

    From the experiment's own batch on, the batch is doubled while it fits and halved
    until it does; then the rest of the memory is filled, as memory is nearly linear in
    the batch. With a trunk that has ``remat`` this is done with and without, and what
    processes more examples a second is chosen.

    Args:
      experiment: What would be run.
      topology: The slice.
      optimized: As for `estimate`, for the result; the search itself compiles quickly.

    Returns:
      The estimate of the fastest; it has the batch and the choice.

    Raises:
      ValueError: If not even the smallest batch fits.
    """
    choices = [experiment]
    if hasattr(experiment.trunk, "remat"):
        choices = [
            dataclasses.replace(experiment, trunk=experiment.trunk.clone(remat=remat))  # type: ignore[call-arg]
            for remat in (False, True)
        ]
    best: tuple[Experiment, Estimate] | None = None
    failure = None
    for choice in choices:
        try:
            found = _largest(choice, topology)
        except OutOfMemoryError as error:
            failure = error
            continue
        if best is None or _speed(found) > _speed(best[1]):
            best = choice, found
    if best is None:
        assert failure is not None
        raise failure
    choice, quick = best
    if not optimized:
        return quick
    for batch_size in _shrinking(choice, topology, quick.batch_size):
        try:
            return estimate(_with_batch(choice, batch_size), topology)
        except OutOfMemoryError as error:
            failure = error
    assert failure is not None
    raise failure


def _speed(found: Estimate) -> float:
    return found.batch_size / found.roofline.total


def _largest(experiment: Experiment, topology: Topology) -> Estimate:
    """The estimate of the largest batch that fits, compiled quickly."""
    step, smallest = _batch_sizes(experiment, topology)
    most = max(smallest, MOST_EXAMPLES * topology.num_chips // step * step)
    size = min(max(experiment.mixture.batch_size // step * step, smallest), most)
    fits: list[Estimate] = []
    too_large = most + step
    while True:
        try:
            fits.append(
                estimate(_with_batch(experiment, size), topology, optimized=False)
            )
        except OutOfMemoryError:
            if size == smallest:
                raise
            too_large = size
        size = _next(fits, too_large, step, smallest)
        if fits and size <= max(item.batch_size for item in fits):
            return max(fits, key=lambda item: item.batch_size)


def _next(fits: list[Estimate], too_large: int, step: int, smallest: int) -> int:
    """The batch to try next; not above the largest that fits if that will do."""
    if not fits:
        return max(smallest, too_large // 2 // step * step)
    fits = sorted(fits, key=lambda item: item.batch_size)
    low = fits[-1]
    target = 2 * low.batch_size
    if len(fits) > 1:
        grown = low.bytes.peak - fits[-2].bytes.peak
        slope = max(1.0, grown / (low.batch_size - fits[-2].batch_size))
        # What lies behind the compiler's own reserve cannot be filled.
        room = 0.97 * low.bytes.capacity - low.bytes.peak
        target = low.batch_size + math.floor(room / slope)
    if target >= too_large:
        target = (low.batch_size + too_large) // 2
    target = target // step * step
    return target if target > (1 + PRECISION) * low.batch_size else low.batch_size


def _shrinking(
    experiment: Experiment, topology: Topology, batch_size: int
) -> Iterator[int]:
    step, smallest = _batch_sizes(experiment, topology)
    while batch_size >= smallest:
        yield batch_size
        batch_size = min(int(0.9 * batch_size), batch_size - step) // step * step


def _batch_sizes(experiment: Experiment, topology: Topology) -> tuple[int, int]:
    """What a batch must be a multiple of, and the smallest."""
    mesh = make_mesh(**dataclasses.asdict(experiment.mesh), devices=topology.devices)
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    multiple = devices * experiment.group_size
    return multiple, multiple * len(experiment.labels)


def _with_batch(experiment: Experiment, size: int) -> Experiment:
    mixture = dataclasses.replace(experiment.mixture, batch_size=size)
    return dataclasses.replace(experiment, mixture=mixture)
