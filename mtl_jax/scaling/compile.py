"""Compiles a training step for a slice, and says what the step will cost."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.flops import count_flops
from mtl_jax.scaling.collectives import Collective, find_collectives
from mtl_jax.scaling.hlo import parse
from mtl_jax.scaling.products import device_flops
from mtl_jax.scaling.roofline import Roofline, make_roofline
from mtl_jax.scaling.topology import Topology
from mtl_jax.scaling.traffic import memory_bytes
from mtl_jax.train import Experiment, build_program
from mtl_jax.train.program import Program, count_parameters


class OutOfMemoryError(ValueError):
    """The step needs more memory than a chip has."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of a chip's memory, by what lies there.

    Attributes:
      parameters: The model.
      optimizer_state: Moments and the like.
      aggregator_state: What the aggregator of task gradients keeps.
      batch: A batch of examples.
      temporaries: All else at the moment when most is in use.
      peak: The whole of it, as the compiler allocates it.
      capacity: The chip's memory.
    """

    parameters: int
    optimizer_state: int
    aggregator_state: int
    batch: int
    temporaries: int
    peak: int
    capacity: int


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: Such as ``"all-to-all"``.
      axes: Names of the mesh axes.
      overlapped: Whether the program goes on while they run.
      count: How many run in a step.
      bytes: What a chip puts in or gets out, whichever is larger, in all of them.
    """

    kind: str
    axes: tuple[str, ...]
    overlapped: bool
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step costs on a slice.

    Attributes:
      topology: Name of the slice.
      chips: Its chips.
      mesh: Axis name -> size; the devices may be more than the chips.
      batch_size: Examples of a batch.
      remat: Whether the trunk recomputes its blocks in the backward pass.
      total_parameters: Parameters.
      active_parameters: Those that one task's example uses.
      bytes: Memory of one chip.
      flops: Operations of a step, as the experiment asks for them.
      useful_flops: The same without what is recomputed to save memory.
      chip_flops: What one chip executes: its share of ``flops``, or more where several
        chips compute the same.
      memory_bytes: Traffic of one chip with its memory.
      collectives: What it exchanges with others, by kind and mesh axes.
      roofline: Least time of a step.
      optimized: Whether the compiler was let do all it can.
      peak_flops: Peak rate of one chip, in bfloat16.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    remat: bool
    total_parameters: int
    active_parameters: int
    bytes: Bytes
    flops: int
    useful_flops: int
    chip_flops: int
    memory_bytes: int
    collectives: tuple[Collectives, ...]
    roofline: Roofline
    optimized: bool
    peak_flops: float

    @property
    def utilization(self) -> float:
        """Useful operations over what the chips could do in the least time: MFU."""
        time = self.roofline.total
        return self.useful_flops / (self.chips * self.peak_flops * time)

    def to_document(self) -> dict[str, Any]:
        """The estimate as JSON, with what follows from it."""
        return dataclasses.asdict(self) | {
            "seconds": self.roofline.total,
            "bound": self.roofline.bound,
            "utilization": self.utilization,
            "examples_per_second": self.batch_size / self.roofline.total,
        }


def estimate(
    experiment: Experiment, topology: Topology, *, optimized: bool = True
) -> Estimate:
    """Compiles the training step for a slice that need not be there.

    Args:
      experiment: What would be run; `mtl_jax.train.validate` it first.
      topology: The slice.
      optimized: Whether the compiler does all it can. Otherwise it takes a quarter of
        the time or less. The collectives are the same, but none is overlapped; peak
        memory is within a tenth; more traffic goes through the memory.

    Raises:
      ValueError: If mesh, batch and slice do not fit.
      OutOfMemoryError: If the step needs more memory than a chip has.
    """
    program = build_program(experiment, topology.devices)
    with _optimization(optimized), _out_of_memory(topology):
        compiled, flops = program.compile_step()
    module = parse(compiled.as_text() or "")
    found = find_collectives(module, program.mesh.shape)
    bytes_ = memory_bytes(module)
    # What kernels written in Pallas do cannot be seen once compiled.
    executed = max(device_flops(module), flops // len(topology.devices))
    total, active = count_parameters(program)
    return Estimate(
        topology=topology.name,
        chips=topology.num_chips,
        mesh=dict(program.mesh.shape),
        batch_size=experiment.mixture.batch_size,
        remat=getattr(experiment.trunk, "remat", False),
        total_parameters=total,
        active_parameters=active,
        bytes=_bytes(program, compiled.memory_analysis(), topology),
        flops=flops,
        useful_flops=_useful_flops(experiment, topology) or flops,
        chip_flops=executed * topology.chip.devices,
        memory_bytes=bytes_ * topology.chip.devices,
        collectives=_by_kind(found, topology.chip.devices),
        roofline=make_roofline(
            topology,
            program.mesh.devices,
            flops=executed,
            memory_bytes=bytes_,
            collectives=found,
        ),
        optimized=optimized,
        peak_flops=topology.chip.flops,
    )


@contextlib.contextmanager
def _optimization(optimized: bool) -> Iterator[None]:
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "UNKNOWN" if optimized else "O0")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


@contextlib.contextmanager
def _out_of_memory(topology: Topology) -> Iterator[None]:
    """Says by how much a step is too large, and what makes it smaller."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(
            f"the step does not fit on {topology.name}: {_excess(str(error))}; make "
            "mixture.batch_size smaller, set trunk.remat=True, or spread parameters "
            "and experts over more chips by mesh.fsdp and mesh.expert"
        ) from error


def _excess(message: str) -> str:
    """The figures in the compiler's complaint."""
    used = re.search(r"Used (\S+) of (\S+) hbm", message)
    if used:
        return f"a device has {used[2]} of memory and would need {used[1]}"
    single = re.search(r"size=(\d+)\) would exceed memory \(size=(\d+)", message)
    if single:
        needed, there = (f"{int(text) / 2**30:.2f}G" for text in single.groups())
        return f"a device has {there} of memory and one array alone needs {needed}"
    return message


def _bytes(program: Program, analysis: Any, topology: Topology) -> Bytes:
    state, shardings = nn.unbox(program.abstract_state), program.state_shardings
    devices = topology.chip.devices
    parts = {
        name: devices * _shard_bytes(getattr(state, name), getattr(shardings, name))
        for name in ("params", "optimizer_state", "aggregator_state")
    }
    batch = program.abstract_batch()
    peak = devices * analysis.peak_memory_in_bytes
    shown = {
        "parameters": parts["params"],
        "optimizer_state": parts["optimizer_state"],
        "aggregator_state": parts["aggregator_state"],
        "batch": devices
        * _shard_bytes(batch, jax.tree.map(lambda leaf: leaf.sharding, batch)),
    }
    return Bytes(
        **shown,
        temporaries=max(0, peak - sum(shown.values())),
        peak=peak,
        capacity=topology.chip.memory,
    )


def _shard_bytes(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree of abstract arrays."""

    def size(leaf: Any, sharding: Any) -> int:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 8
        shape = sharding.shard_shape(leaf.shape)
        return int(np.prod(shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def _useful_flops(experiment: Experiment, topology: Topology) -> int | None:
    """Operations of a step in which nothing is recomputed; None if nothing is."""
    if not getattr(experiment.trunk, "remat", False):
        return None
    kept = dataclasses.replace(experiment, trunk=experiment.trunk.clone(remat=False))
    program = build_program(kept, topology.devices)
    with program.scope():
        jaxpr = jax.make_jaxpr(program.step)(
            nn.unbox(program.abstract_state), program.abstract_batch()
        )
    return count_flops(jaxpr)


def _by_kind(found: Sequence[Collective], devices: int) -> tuple[Collectives, ...]:
    sums: dict[tuple[str, tuple[str, ...], bool], tuple[int, int]] = {}
    for item in found:
        key = item.kind, item.axes, item.overlapped
        count, size = sums.get(key, (0, 0))
        sums[key] = count + item.times, size + item.times * item.bytes * devices
    return tuple(
        Collectives(*key, *value)
        for key, value in sorted(sums.items(), key=lambda pair: -pair[1][1])
    )
