import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import experiment
from steps import go_on, run

from mtl_jax import optim
from mtl_jax.data import training_batches
from mtl_jax.sharding import report
from mtl_jax.train import MeshShape, build_program
from mtl_jax.train import program as program_module
from mtl_jax.train.gradients import at_params
from mtl_jax.train.program import count_parameters


@functools.cache
def on_one_device():
    return run(experiment(), jax.devices()[:1], 20)


@functools.cache
def compiled_on_eight_devices(shape):
    program = build_program(experiment(mesh=shape))
    return program, program.compile_step()[0]


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(data=2, expert=4),
        pytest.param(MeshShape(data=8), marks=pytest.mark.slow),
        pytest.param(MeshShape(data=2, fsdp=2, expert=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_twenty_steps_are_the_same_on_one_device_and_on_eight(shape):
    one, _ = on_one_device()
    eight, _ = go_on(*compiled_on_eight_devices(shape), 20)
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_experts_are_sharded_and_tokens_are_exchanged():
    program, step = compiled_on_eight_devices(MeshShape(data=2, expert=4))
    rows = report(program.abstract_state.params, program.mesh, program.experiment.rules)
    experts = [row for row in rows if "experts" in row.path]
    assert len(experts) == 4
    assert all("expert" in str(row.spec) for row in experts)
    state = program.init_state()
    kernel = state.params["trunk"]["block_1"]["moe"]["experts"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == kernel.shape[0] // 4
    moment = optax.tree.get(state.optimizer_state, "mu")["trunk"]["block_1"]["moe"]
    assert moment["experts"]["up"]["kernel"].sharding == kernel.sharding
    text = step.as_text()
    assert "all-to-all" in text
    assert "all-gather" not in text


@pytest.mark.slow
def test_data_mesh_step_equals_a_pmap_step():
    """The data mesh against the older way: one program a device, gradients averaged."""
    # Not Adam, whose first step hides the size of gradients, nor a warm-up from 0.
    chosen = experiment(
        mesh=MeshShape(data=8),
        num_experts=0,
        optimizer=lambda num_steps: optax.sgd(0.1),
    )
    program = build_program(chosen)
    state = program.init_state()
    batches = training_batches(
        chosen.mixture,
        {task.name: task.field for task in chosen.tasks},
        0,
        program.share_multiple,
    )
    batch = next(batches)
    optimizer = chosen.optimizer(num_steps=chosen.num_steps)
    aggregator = optim.sum(num_tasks=4)
    gradient_function = at_params(program.objective, aggregator)

    def device_step(params, optimizer_state, batch, key):
        _, gradient = gradient_function(params, batch, key, aggregator.init(params))
        # Every device has the same number of labels of each task, so the mean over
        # devices of its gradients is that of the global mean loss.
        gradient = jax.lax.pmean(gradient, "devices")
        updates, _ = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates)

    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    params = jax.device_get(state.params)
    expected = jax.pmap(device_step, "devices", in_axes=(None, None, 0, None))(
        params, jax.device_get(state.optimizer_state), split, jax.random.key(0)
    )
    step, _ = program.compile_step()
    state, metrics = step(state, program.place(batch))
    assert metrics["all/update_norm"] > 1e-2
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs[0], rtol=2e-5, atol=2e-7
        ),
        jax.device_get(state.params),
        jax.device_get(expected),
    )


def test_the_step_is_traced_once(monkeypatch):
    make = program_module.make_train_step
    monkeypatch.setattr(
        program_module,
        "make_train_step",
        lambda *arguments: chex.assert_max_traces(make(*arguments), n=1),
    )
    run(experiment(num_experts=0), jax.devices()[:1], 4)


@pytest.mark.slow
def test_gradients_are_accumulated_with_experts_on_a_mesh():
    def optimizer(num_steps):
        accumulating = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
        return accumulating.gradient_transformation()

    program = build_program(
        experiment(mesh=MeshShape(data=2, expert=4), optimizer=optimizer)
    )
    state = program.init_state()
    params = jax.device_get(state.params)
    kernel = state.params["trunk"]["block_1"]["moe"]["experts"]["up"]["kernel"]
    accumulated = state.optimizer_state.acc_grads["trunk"]["block_1"]["moe"]
    assert accumulated["experts"]["up"]["kernel"].sharding == kernel.sharding
    batches = training_batches(
        program.experiment.mixture,
        {task.name: task.field for task in program.experiment.tasks},
        0,
        program.share_multiple,
    )
    step, _ = program.compile_step()
    with jax.set_mesh(program.mesh):
        gradient = jax.jit(jax.grad(program.objective.summed_loss))
        gradients = []
        for _ in range(2):
            jax.tree.map(np.testing.assert_array_equal, params, state.params)
            batch = program.place(next(batches))
            key = jax.random.fold_in(state.key, state.step)
            gradients.append(jax.device_get(gradient(params, batch, key)))
            state, _ = step(state, batch)
    expected = jax.tree.map(lambda p, a, b: p - 0.05 * (a + b), params, *gradients)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=1e-5, atol=1e-6
        ),
        jax.device_get(state.params),
        expected,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("method", "at"), [("mgda", "params"), ("upgrad", "features")])
def test_training_lowers_the_loss(method, at):
    chosen = experiment(
        num_experts=0,
        aggregator=getattr(optim, method),
        gradients_at=at,
    )
    losses, _ = run(chosen, jax.devices()[:1], 12)
    assert np.all(np.isfinite(losses))
    assert losses[-3:].sum() < losses[:3].sum()


@pytest.mark.slow
def test_sharpness_evaluates_at_the_perturbed_point_of_the_same_batch():
    sharpness = functools.partial(optim.sharpness_aware, rho=0.1)
    chosen = experiment(num_experts=0, sharpness=sharpness)
    program = build_program(chosen, jax.devices()[:1])
    state = program.init_state()
    params = jax.device_get(state.params)
    batches = training_batches(
        chosen.mixture, {task.name: task.field for task in chosen.tasks}, 0
    )
    batch = program.place(next(batches))
    key = jax.random.fold_in(state.key, 0)
    gradient = jax.jit(jax.grad(program.objective.summed_loss))
    ascent = jax.device_get(gradient(params, batch, key))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(ascent)))
    moved = jax.tree.map(lambda p, g: p + np.float32(0.1) * g / norm, params, ascent)
    expected = gradient(moved, batch, key)
    step, _ = program.compile_step()
    _, metrics = step(state, batch)
    np.testing.assert_allclose(
        metrics["all/gradient_norm"], optax.tree.norm(expected), rtol=1e-5
    )


def test_parameter_counts():
    program = build_program(experiment(), jax.devices()[:1])
    params = nn.unbox(program.abstract_state.params)
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    # Two of four experts of (16·16 + 16) + (16·16 + 16) parameters, and one of four
    # routers of 16·4, are in use.
    inactive = 2 * (2 * (16 * 16 + 16)) + 3 * 16 * 4
    assert count_parameters(program) == (total, total - inactive)


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(ValueError, match="expert=3"):
        build_program(experiment(mesh=MeshShape(data=-1, expert=3)))


def test_a_single_device_needs_no_other_config():
    program = build_program(
        experiment(mesh=MeshShape(data=2, expert=4)), jax.devices()[:1]
    )
    assert set(program.mesh.shape.values()) == {1}


@pytest.mark.slow
def test_the_seed_decides_the_parameters():
    def kernel(seed):
        program = build_program(experiment(num_experts=0, seed=seed), jax.devices()[:1])
        return program.init_state().params["trunk"]["block_0"]["mlp"]["up"]["kernel"]

    np.testing.assert_array_equal(kernel(0), kernel(0))
    assert not jnp.array_equal(kernel(0), kernel(1))


def test_a_balancer_sees_the_same_batch_again_after_the_update():
    # A balancer that only remembers what it was shown.
    def method(num_tasks):
        return optim.Balancer(
            init=lambda: (jnp.zeros(num_tasks), jnp.zeros(num_tasks)),
            weights=lambda losses, memory, active: (
                jnp.ones(num_tasks),
                (losses, memory[1]),
            ),
            observe=lambda losses, memory, active: (memory[0], losses),
        )

    chosen = experiment(num_experts=0, aggregator=method)
    program = build_program(chosen, jax.devices()[:1])
    step, _ = program.compile_step()
    batches = training_batches(
        chosen.mixture, {task.name: task.field for task in chosen.tasks}, 0, 8
    )
    batch = program.place(next(batches))
    # The first step of the warm-up moves nothing, the second does.
    state, metrics = step(program.init_state(), batch)
    before, after = state.aggregator_state.memory
    np.testing.assert_allclose(after, before, rtol=1e-6)
    state, metrics = step(state, batch)
    before, after = state.aggregator_state.memory
    assert float(metrics["all/update_norm"]) > 0
    assert np.all(np.asarray(after) != np.asarray(before))
    losses = jax.jit(program.objective.losses)
    again, _ = losses(state.params, batch, jax.random.key(0))
    # No noise in a dense trunk: the losses depend on parameters and batch alone.
    np.testing.assert_allclose(after, again, rtol=1e-5)


def test_clipping_in_place_of_an_aggregator_is_refused():
    chosen = experiment(aggregator=lambda num_tasks: optax.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match="put them in the optimizer"):
        build_program(chosen, jax.devices()[:1])


@pytest.mark.slow
def test_memory_of_rows_is_sharded_like_the_parameters():
    """By name: whole, and where parameters are grouped."""

    def method(num_tasks):
        return optim.grouped(optim.db_mtl, num_tasks, r"(block_\d+)/moe/experts")

    program = build_program(
        experiment(aggregator=method, mesh=MeshShape(data=2, fsdp=2, expert=2))
    )
    kernel = program.state_shardings.params["trunk"]["block_1"]["moe"]["experts"]["up"]
    shardings = jax.tree_util.tree_leaves_with_path(
        program.state_shardings.aggregator_state
    )
    rows = [
        sharding.spec
        for path, sharding in shardings
        if jax.tree_util.keystr(path).endswith("['experts']['up']['kernel']")
    ]
    assert rows == [jax.P(None, *kernel["kernel"].spec)]
    state = program.init_state()
    batches = training_batches(
        program.experiment.mixture,
        {task.name: task.field for task in program.experiment.tasks},
        0,
        program.share_multiple,
    )
    step, _ = program.compile_step()
    before = jax.tree.map(lambda leaf: leaf.sharding, state.aggregator_state)
    state, metrics = step(state, program.place(next(batches)))
    assert np.isfinite(float(metrics["all/loss"]))
    assert jax.tree.map(lambda leaf: leaf.sharding, state.aggregator_state) == before


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        (optim.db_mtl, {"num_routers": None, "gradients_at": "features"}, "remembered"),
        (optim.modo, {}, "second is missing"),
        (functools.partial(optim.dwa, window=10**12), {}, r"32 bits \(.* 10{12}\)$"),
    ],
)
def test_what_an_aggregator_cannot_work_on_is_found_before_compiling(
    method, fields, expected
):
    with pytest.raises(ValueError, match=f"^aggregator: .*{expected}"):
        build_program(experiment(aggregator=method, **fields))
