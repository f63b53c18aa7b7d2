import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe import dispatch


def random_choices(seed, groups, tokens, experts, selected):
    rng = np.random.default_rng(seed)
    # Squares make low experts popular, so that some overflow and some stay empty.
    scores = rng.random((groups, tokens, experts)) + np.arange(experts) ** 2 / experts
    return np.argsort(scores, axis=-1)[..., :selected].astype(np.int32)


def lined_up(expert_index, num_experts, capacity):
    """Slots by a loop: (group, token, choice) -> (expert, position) of those kept."""
    kept = {}
    for group, choices in enumerate(expert_index):
        taken = [0] * num_experts
        for choice in range(choices.shape[1]):
            for token, expert in enumerate(choices[:, choice]):
                if taken[expert] < capacity:
                    kept[group, token, choice] = (int(expert), taken[expert])
                taken[expert] += 1
    return kept


def in_buffers(expert_index, num_experts, capacity, priority=None):
    positions = dispatch.queue(expert_index, num_experts, capacity, priority)
    return dispatch.in_buffers(expert_index, positions, capacity)


def test_first_choices_come_before_second_ones():
    # Two tokens want both experts, which have one slot each: token 0 prefers expert
    # 0, token 1 expert 1. Were tokens served one after the other, the first would
    # take both slots.
    slots = in_buffers(jnp.array([[[0, 1], [1, 0]]]), 2, capacity=1)
    np.testing.assert_array_equal(slots.row, [[[0, -1], [1, -1]]])
    # Assignment 0 is token 0's first choice, assignment 2 token 1's.
    np.testing.assert_array_equal(slots.assignment, [[[0], [2]]])


def test_earlier_tokens_come_first():
    slots = in_buffers(jnp.array([[[1], [1], [1]]]), 2, capacity=2)
    np.testing.assert_array_equal(slots.row, [[[2], [3], [-1]]])
    np.testing.assert_array_equal(slots.assignment, [[[-1, -1], [0, 1]]])


def test_tokens_of_higher_priority_come_first():
    # Three tokens want expert 1, which has two slots; the first is the least sure.
    index = jnp.array([[[1], [1], [1]]])
    slots = in_buffers(index, 2, 2, jnp.array([[0.1, 0.5, 0.9]]))
    np.testing.assert_array_equal(slots.row, [[[-1], [3], [2]]])


def test_priority_does_not_matter_where_there_is_room():
    index = jnp.array(random_choices(1, 3, 16, 6, 2))
    priority = jax.random.uniform(jax.random.key(0), (3, 16))
    positions = dispatch.queue(index, 6, 16, priority)
    assert jnp.all(positions.kept)
    plain = dispatch.queue(index, 6, 16)
    np.testing.assert_array_equal(positions.taken, plain.taken)
    # The same places are taken, each once.
    for field in (positions, plain):
        taken = dispatch.in_buffers(index, field, 16).row
        assert len(np.unique(taken)) == index.size


@pytest.mark.parametrize("sizes", [(1,), (8,), (2, 3, 7)])
@pytest.mark.parametrize("capacity", [3, 16])
def test_sorted_rows_against_a_loop(capacity, sizes):
    index = random_choices(capacity, 3, 16, 6, 2)
    # The last expert is not here, as on a device that has the others alone.
    positions = dispatch.queue(jnp.array(index), 5, capacity)
    slots, count = dispatch.in_order(jnp.array(index), positions, sizes)
    kept = lined_up(index, 6, capacity)
    rows = []
    for expert in range(5):
        mine = [
            (group * 16 + token) * 2 + choice
            for (group, token, choice), place in sorted(
                kept.items(), key=lambda item: (item[0][0], item[1])
            )
            if place[0] == expert
        ]
        assert count[expert] == len(mine)
        # Full blocks of the largest size, and the smallest that holds the rest.
        left = padded = len(mine)
        while left > sizes[-1]:
            left -= sizes[-1]
        padded += min(size for size in sizes if size >= left) - left if mine else 0
        rows += mine + [-1] * (padded - len(mine))
    np.testing.assert_array_equal(slots.assignment[: len(rows)], rows)
    assert np.all(slots.assignment[len(rows) :] == -1)
    expected = np.full(index.size, -1)
    for row, assignment in enumerate(rows):
        if assignment >= 0:
            expected[assignment] = row
    np.testing.assert_array_equal(slots.row.reshape(-1), expected)


@pytest.mark.parametrize("capacity", [1, 3, 8, 16])
@pytest.mark.parametrize("selected", [1, 2, 4])
def test_slots_against_a_loop(capacity, selected):
    index = random_choices(capacity, 3, 16, 6, selected)
    slots = in_buffers(jnp.array(index), 6, capacity)
    kept = lined_up(index, 6, capacity)
    expected = np.full(index.shape, -1)
    inverse = np.full((3, 6, capacity), -1)
    for (group, token, choice), (expert, position) in kept.items():
        expected[group, token, choice] = (expert * 3 + group) * capacity + position
        assignment = (group * 16 + token) * selected + choice
        inverse[group, expert, position] = assignment
    np.testing.assert_array_equal(slots.row, expected)
    np.testing.assert_array_equal(slots.assignment, inverse)


@pytest.mark.parametrize("capacity", [2, 5, 16])
def test_values_and_gradients_against_one_hot_products(capacity):
    index = random_choices(capacity, 3, 16, 6, 2)
    slots = in_buffers(jnp.array(index), 6, capacity)
    # [groups tokens choices experts capacity], one where an assignment has its slot.
    mask = np.zeros((*index.shape, 6, capacity), np.float32)
    for key, place in lined_up(index, 6, capacity).items():
        mask[key + place] = 1
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.normal(keys[0], (3, 16, 4))
    weight = jax.random.uniform(keys[1], (3, 16, 2))
    scale = jax.random.normal(keys[2], (6, 3, capacity, 4))

    def gathered(tokens, weight, scale):
        buffers = jnp.tanh(
            scale * dispatch.dispatch(tokens, slots).reshape(scale.shape)
        )
        return dispatch.combine(buffers.reshape(-1, 4), weight, slots)

    def multiplied(tokens, weight, scale):
        buffers = jnp.tanh(scale * jnp.einsum("gskec,gsd->egcd", mask, tokens))
        return jnp.einsum("gskec,gsk,egcd->gsd", mask, weight, buffers)

    cotangent = jax.random.normal(jax.random.key(1), tokens.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, *arguments):
        value, pullback = jax.vjp(function, *arguments)
        return value, *pullback(cotangent)

    for ours, theirs in zip(
        value_and_gradients(gathered, tokens, weight, scale),
        value_and_gradients(multiplied, tokens, weight, scale),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    index = jnp.array(random_choices(0, 2, 8, 4, 2))
    slots = in_buffers(index, 4, 3)
    kept = np.asarray(slots.row >= 0).sum(-1, dtype=np.float32)[..., None]
    tokens = jax.random.normal(jax.random.key(0), (2, 8, 3))

    def cubes(tokens):
        return jnp.sum(dispatch.dispatch(tokens, slots) ** 3)

    # Each token is in as many slots as it has kept choices, so Σ 3x² and Σ 6x.
    slope = jax.grad(cubes)(tokens)
    np.testing.assert_allclose(slope, 3 * kept * tokens**2, rtol=1e-5)
    curvature = jax.grad(lambda tokens: jnp.sum(jax.grad(cubes)(tokens)))(tokens)
    np.testing.assert_allclose(curvature, 6 * kept * tokens, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "capacity"),
    [
        ((256, 8, 2, 1.25), 80),
        ((10, 4, 1, 1.0), 3),
        ((10, 64, 1, 1.0), 1),
        # No expert gets a token twice.
        ((10, 4, 2, 100.0), 10),
        # 1.1 · 100 / 10 is 11, and 1.1 · 100 in binary more than 110.
        ((100, 10, 1, 1.1), 11),
        ((100, 10, 1, np.float32(1.1)), 11),
        ((100, 10, 1, 1.1000001), 12),
        ((100, 10, 1, 1e-9), 1),
        ((100, 10, 1, 2), 20),
    ],
)
def test_capacity(arguments, capacity):
    assert dispatch.slots_per_expert(*arguments) == capacity


@pytest.mark.parametrize("capacity_factor", [0.0, -1.0])
def test_no_capacity_is_an_error(capacity_factor):
    with pytest.raises(ValueError, match=rf"capacity_factor={capacity_factor}"):
        dispatch.slots_per_expert(10, 4, 1, capacity_factor)
