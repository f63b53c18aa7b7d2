"""A training program: everything that is built once, before the first step."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax.data.batch import Batch
from mtl_jax.data.mixture import stack_records
from mtl_jax.flops import count_flops
from mtl_jax.optim import Aggregator, Balancer, from_balancer
from mtl_jax.optim import sum as plain_sum
from mtl_jax.sharding import make_mesh, param_shardings, spec
from mtl_jax.sharding.distributed import local_rows
from mtl_jax.sharding.rules import is_boxed, path_name
from mtl_jax.train.debug_nans import explaining
from mtl_jax.train.experiment import Experiment, MeshShape
from mtl_jax.train.faults import no_faults
from mtl_jax.train.gradients import (
    EMPTY,
    GradientFunction,
    at_features,
    at_params,
    balanced,
)
from mtl_jax.train.initialize import initialized
from mtl_jax.train.objective import Objective
from mtl_jax.train.state import TrainState
from mtl_jax.train.step import Step, make_train_step, observing


@dataclasses.dataclass(frozen=True)
class Program:
    """An experiment on a mesh, ready to be compiled.

    Attributes:
      experiment: What is run.
      mesh: The devices.
      objective: The losses of the tasks on the sources that are trained on.
      init: Function of a key to a state of fresh parameters, which are boxed; or of a
        key and parameters to a state of those.
      step: Pure training step, not jitted.
      abstract_state: Shapes and logical axes of the state, boxed.
      state_shardings: Sharding of every leaf of the (unboxed) state.
      share_multiple: What each source's share of a batch must be divisible by.
    """

    experiment: Experiment
    mesh: Mesh
    objective: Objective
    init: Callable[..., TrainState]
    step: Step
    abstract_state: TrainState
    state_shardings: TrainState
    share_multiple: int

    @property
    def batch_sharding(self) -> NamedSharding:
        """Examples are split over the mesh axes of the rule ``batch``."""
        return NamedSharding(self.mesh, spec(self.experiment.rules, ("batch",)))

    @property
    def replicated(self) -> NamedSharding:
        """Every device, and so every process, holds the whole of an array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def local_rows(self, num_examples: int) -> np.ndarray:
        """Positions of the examples that this process reads, of ``num_examples``."""
        return local_rows(self.batch_sharding, num_examples)

    def place(self, examples: Any) -> Any:
        """Puts a batch, or a part of one, on the devices.

        Args:
          examples: Pytree of arrays ``[examples, ...]`` with the rows of this process.

        Returns:
          Global arrays with the rows of all processes.
        """
        return jax.make_array_from_process_local_data(self.batch_sharding, examples)

    def abstract_batch(self) -> Batch:
        """Shapes, types and shardings of a training batch."""
        experiment = self.experiment
        fields = {task.name: task.field for task in experiment.tasks}
        shares = experiment.mixture.examples_per_batch(self.share_multiple)
        batch = {}
        for name, share in shares.items():
            component = experiment.mixture.components[name]
            batch[name] = stack_records(
                [(0, component.train[0])],
                component.input_field,
                {task: fields[task] for task in component.tasks},
            )
            # One record is read, however many a batch for thousands of devices has.
            batch[name] = jax.tree.map(
                lambda x, share=share: jax.ShapeDtypeStruct(
                    (share, *x.shape[1:]), x.dtype, sharding=self.batch_sharding
                ),
                batch[name],
            )
        return batch

    def scope(self):
        """Context in which the program is traced: its mesh."""
        return jax.set_mesh(self.mesh)

    def abstract_params(self) -> Any:
        """Shapes and types of the parameters, unboxed."""
        return nn.unbox(self.abstract_state.params)

    def fresh_state(self) -> TrainState:
        """A state of fresh parameters, every array created where it belongs."""
        return self._state()

    def init_state(self) -> TrainState:
        """The state that a run starts from: fresh, unless ``initialize`` changes it."""
        initialize = self.experiment.initialize
        if initialize is None:
            return self._state()
        params = initialized(
            initialize, self._state().params, self.state_shardings.params
        )
        # What optimizers and aggregators keep may depend on the parameters.
        return self._state(params)

    def _state(self, *params: Any) -> TrainState:
        init = jax.jit(
            lambda data, *params: nn.unbox(
                self.init(jax.random.wrap_key_data(data), *params)
            ),
            out_shardings=self.state_shardings,
        )
        # As an array of NumPy's it is the same on the devices of all processes.
        key = jax.random.key(self.experiment.seed)
        return init(np.asarray(jax.random.key_data(key)), *params)

    def compile_step(
        self, *, keep_state: bool = False
    ) -> tuple[jax.stages.Compiled, int]:
        """The compiled step ``(state, batch) -> (state, metrics)`` and its FLOPs.

        FLOPs are those of a whole step on all devices.

        Args:
          keep_state: Whether the state that a step is given can be used afterwards,
            which takes the memory of another; by default it is donated.
        """
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            nn.unbox(self.abstract_state),
            self.state_shardings,
        )
        with self.scope():
            traced = jax.jit(
                self.step,
                donate_argnums=() if keep_state else 0,
                out_shardings=(self.state_shardings, self.replicated),
            ).trace(state, self.abstract_batch())
            return traced.lower().compile(), count_flops(traced.jaxpr)

    def compile_explained_step(self) -> tuple[Step, int]:
        """As `compile_step`, of a step that fails where it is faulty, and says why.

        It waits for its own end, and takes the memory of another state.
        """
        compiled, flops = self.compile_step(keep_state=True)
        names = [task.name for task in self.experiment.tasks]
        return explaining(compiled, self.step, names, self.scope), flops


def build_program(
    experiment: Experiment, devices: Sequence[Any] | None = None
) -> Program:
    """Builds the mesh, the step and the shardings of an experiment.

    Args:
      experiment: What is run; `validate` it first.
      devices: The devices to use; all by default.

    Returns:
      The program.

    Raises:
      ValueError: If the mesh does not divide the devices, the experts or the shares
        of the sources.
    """
    devices = jax.devices() if devices is None else devices
    shape = MeshShape(1) if len(devices) == 1 else experiment.mesh
    mesh = make_mesh(**dataclasses.asdict(shape), devices=devices)
    share_multiple = experiment.group_size * math.prod(
        mesh.shape[a] for a in mesh.axis_names[:3]
    )
    experiment.mixture.examples_per_batch(share_multiple)
    if experiment.evaluation_batch_size % share_multiple:
        raise ValueError(
            f"evaluation_batch_size is {experiment.evaluation_batch_size}; it must be "
            f"a multiple of {share_multiple} (devices and routing groups)"
        )
    num_tasks = len(experiment.tasks)
    objective = Objective(
        experiment.model,
        experiment.tasks,
        experiment.labels,
        experiment.mutual_information_weight,
    )
    method = _method(experiment)
    if isinstance(method, Balancer):
        gradient_function = balanced(objective, method)
        aggregator = from_balancer(method, num_tasks)
    else:
        take = {"params": at_params, "features": at_features}[experiment.gradients_at]
        gradient_function = take(objective, method)
        aggregator = method
    optimizer = experiment.optimizer(num_steps=experiment.num_steps)
    step = make_train_step(
        _sharpened(gradient_function, objective, experiment),
        optimizer,
        tuple(task.name for task in experiment.tasks),
        experiment.non_finite,
    )
    if isinstance(method, Balancer) and method.observe is not None:
        step = observing(step, objective, method)

    def init(key: jax.Array, params: Any = None) -> TrainState:
        params_key, step_key = jax.random.split(key)
        if params is None:
            params = experiment.model.init(params_key, experiment.inputs)
        return TrainState(
            jnp.int32(0),
            params,
            _box_like(aggregator.init(nn.unbox(params["trunk"])), params["trunk"]),
            optimizer.init(params),  # type: ignore[arg-type]
            step_key,
            experiment.model.init_collections(params_key, experiment.inputs),
            no_faults(num_tasks),
        )

    abstract_state = jax.eval_shape(init, jax.random.key(0))
    _check_update(aggregator, experiment, nn.unbox(abstract_state.params["trunk"]))
    return Program(
        experiment,
        mesh,
        objective,
        init,
        step,
        abstract_state,
        param_shardings(abstract_state, mesh, experiment.rules),
        share_multiple,
    )


def _box_like(aggregator_state: Any, trunk: Any) -> Any:
    """Gives what an aggregator keeps for each parameter the parameter's logical axes.

    A leaf belongs to the parameter whose path its own path ends with. What is kept for
    each task has one more axis, in front.
    """
    boxes: dict[Any, Any] = dict(
        jax.tree_util.tree_leaves_with_path(trunk, is_leaf=is_boxed)
    )

    def box(path: tuple, leaf: jax.Array) -> Any:
        for start in range(len(path)):
            found = boxes.get(path[start:])
            if found is not None and is_boxed(found):
                by_task = ("task",) * (leaf.ndim - found.value.ndim)
                return found.replace(value=leaf, names=by_task + found.names)
        return leaf

    return jax.tree_util.tree_map_with_path(box, aggregator_state)


def _method(experiment: Experiment) -> Aggregator | Balancer:
    method = experiment.aggregator(num_tasks=len(experiment.tasks))
    if not isinstance(method, Aggregator | Balancer):
        raise ValueError(
            f"aggregator makes a {type(method).__name__}; it must make an aggregator "
            "or a balancer of mtl_jax.optim. Clipping and the like act on the one "
            "gradient that comes out of it: put them in the optimizer"
        )
    return method


def _check_update(aggregator: Aggregator, experiment: Experiment, trunk: Any) -> None:
    """Finds out before anything is compiled what an aggregator cannot work on."""
    count = len(experiment.tasks)

    def update(params: Any) -> Any:
        state = aggregator.init(params)
        at = {
            "params": params,
            "features": dict.fromkeys(experiment.labels, jnp.zeros(1)),
        }[experiment.gradients_at]
        rows = jax.tree.map(
            lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), at
        )
        parameters = (params,) if at is params else ()
        losses, active = jnp.ones(count), jnp.ones(count, bool)
        return aggregator.update(rows, state, *parameters, losses=losses, active=active)

    try:
        jax.eval_shape(update, trunk)
    except ValueError as error:
        raise ValueError(f"aggregator: {error}") from error
    except OverflowError as error:
        raise ValueError(
            f"aggregator: one of its numbers takes more than 32 bits ({error})"
        ) from error


def _sharpened(
    gradient_function: GradientFunction, objective: Objective, experiment: Experiment
) -> GradientFunction:
    if experiment.sharpness is None:
        return gradient_function
    # Uphill of the plain sum of all losses, but for those of tasks at fault.
    num_tasks = len(experiment.tasks)
    take = at_params if objective.model.task_conditioned else at_features
    summed = take(objective, plain_sum(num_tasks))

    def ascent(params, batch, key, aggregator_state, collections=EMPTY):
        del aggregator_state
        state = plain_sum(num_tasks).init(params["trunk"])
        return summed(params, batch, key, state, collections)

    return experiment.sharpness(gradient_function, ascent=ascent)


def count_parameters(program: Program) -> tuple[int, int]:
    """Parameters of the model, and how many of them one token of one task uses.

    A token uses ``num_selected`` experts of each layer, of all layers the same number,
    and its task's router. All heads count as used.

    Args:
      program: The program.

    Returns:
      (total, active).
    """
    trunk: Any = program.experiment.trunk
    moe = getattr(trunk, "moe", None)
    mixtures = moe if isinstance(moe, tuple) else (moe,)
    selected = [make().num_selected for make in mixtures if make is not None]
    total = active = 0.0
    for path, box in jax.tree_util.tree_leaves_with_path(
        program.abstract_state.params, is_leaf=is_boxed
    ):
        names = box.names if isinstance(box, nn.Partitioned) else ()
        leaf = nn.unbox(box)
        size = float(np.prod(leaf.shape))
        total += size
        if "expert" in names:
            # Those of attention are its heads.
            heads = "/attention/" in path_name(path)
            used = trunk.num_heads if heads else selected[0]
            size *= used / leaf.shape[names.index("expert")]
        if "task" in names:
            size /= leaf.shape[names.index("task")]
        active += size
    return round(total), round(active)
