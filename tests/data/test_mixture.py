import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from mtl_jax.data import (
    Component,
    Field,
    Mixture,
    evaluation_batches,
    training_batches,
)

FIELDS = {"size": "value", "parity": "odd"}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A source of ``count`` records that begin at ``first``."""

    count: int
    first: int = 0

    @property
    def fields(self):
        return {
            "image": Field((1, 1, 1), "int32"),
            "value": Field((), "float32"),
            "odd": Field((), "int32", 2),
        }

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        value = self.first + index
        return {
            "image": np.full((1, 1, 1), value, np.int32),
            "value": np.float32(value),
            "odd": np.int32(value % 2),
        }


def component(count=10, first=0, tasks=("size",), **options):
    return Component(
        train=Numbers(count, first), test=Numbers(7, first), tasks=tasks, **options
    )


def two_sources(**options):
    return Mixture(
        {
            "few": component(6, tasks=("size", "parity")),
            "many": component(20, first=100, weight=3.0),
        },
        batch_size=8,
        **options,
    )


def take(batches, number):
    return [next(batches) for _ in range(number)]


def indices(batches, source):
    return np.concatenate([batch[source].index for batch in batches]).tolist()


def shares(weights, batch_size, multiple_of=1, temperature=1.0):
    components = {name: component(weight=w) for name, w in weights.items()}
    mixture = Mixture(components, batch_size, temperature)
    return mixture.examples_per_batch(multiple_of)


@pytest.mark.parametrize(
    ("weights", "batch_size", "options", "expected"),
    [
        ({"a": 1, "b": 1}, 8, {}, {"a": 4, "b": 4}),
        # 10/6 (1, 2, 3) = 1.67, 3.33, 5: the largest remainder is that of a.
        ({"a": 1, "b": 2, "c": 3}, 10, {}, {"a": 2, "b": 3, "c": 5}),
        # 4.5 each: of equal remainders the first.
        ({"a": 1, "b": 1}, 9, {}, {"a": 5, "b": 4}),
        # Three units of four examples, 0.75, 0.75, 1.5 of them.
        ({"a": 1, "b": 1, "c": 2}, 12, {"multiple_of": 4}, {"a": 4, "b": 4, "c": 4}),
        # Nobody with a weight is left out.
        ({"a": 1, "b": 1000}, 8, {}, {"a": 1, "b": 7}),
        ({"a": 1, "b": 1, "c": 1000}, 4, {}, {"a": 1, "b": 1, "c": 2}),
        # A weight of 0 is no part of the batch.
        ({"a": 0, "b": 2}, 8, {}, {"b": 8}),
        # Square roots at temperature 2, squares at 1/2; even at infinity.
        ({"a": 1, "b": 9}, 8, {"temperature": 2.0}, {"a": 2, "b": 6}),
        ({"a": 1, "b": 3}, 10, {"temperature": 0.5}, {"a": 1, "b": 9}),
        ({"a": 1, "b": 9}, 8, {"temperature": float("inf")}, {"a": 4, "b": 4}),
        # So sharp that the powers of unscaled weights would overflow.
        ({"a": 3, "b": 2}, 8, {"temperature": 1e-4}, {"a": 7, "b": 1}),
    ],
)
def test_shares_by_hand(weights, batch_size, options, expected):
    assert shares(weights, batch_size, **options) == expected


def test_shares_add_up_and_stay_within_one_of_exact():
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights = {str(i): float(w) for i, w in enumerate(rng.uniform(1, 4, size=5))}
        unit = int(rng.integers(1, 5))
        found = shares(weights, 64 * unit, multiple_of=unit)
        assert sum(found.values()) == 64 * unit
        for name, count in found.items():
            exact = 64 * weights[name] / sum(weights.values())
            assert count % unit == 0
            assert abs(count / unit - exact) < 1


@pytest.mark.parametrize(
    ("weights", "batch_size", "options", "message"),
    [
        ({"a": 1, "b": -1}, 8, {}, "mixture weights"),
        ({"a": 0, "b": 0}, 8, {}, "mixture weights"),
        ({"a": float("inf")}, 8, {}, "mixture weights"),
        ({"a": float("nan")}, 8, {}, "mixture weights"),
        ({"a": 1}, 8, {"temperature": 0}, "mixture.temperature is 0"),
        ({"a": 1}, 8, {"temperature": -1}, "mixture.temperature is -1"),
        ({"a": 1}, 8, {"temperature": float("nan")}, "mixture.temperature is nan"),
        ({"a": 1}, 10, {"multiple_of": 4}, "batch_size is 10; .* multiple of 4"),
        ({"a": 1, "b": 1}, 4, {"multiple_of": 4}, "at least 8 for the 2 sources"),
        ({"a": 1}, 0, {}, "batch_size is 0"),
    ],
)
def test_impossible_shares_are_refused(weights, batch_size, options, message):
    with pytest.raises(ValueError, match=message):
        shares(weights, batch_size, **options)


def test_every_batch_holds_the_same_share_of_each_source():
    for batch in take(training_batches(two_sources(), FIELDS, seed=0), 10):
        assert {name: len(e.index) for name, e in batch.items()} == {
            "few": 2,
            "many": 6,
        }
        assert set(batch["few"].targets) == {"size", "parity"}
        assert set(batch["many"].targets) == {"size"}
        for first, examples in ((0, batch["few"]), (100, batch["many"])):
            values = examples.inputs[:, 0, 0, 0]
            np.testing.assert_array_equal(values, first + examples.index)
            np.testing.assert_array_equal(examples.targets["size"], values)
            assert examples.mask["size"].all()
        np.testing.assert_array_equal(
            batch["few"].targets["parity"], batch["few"].index % 2
        )


def test_shares_are_multiples_of_what_is_asked():
    batch = next(training_batches(two_sources(), FIELDS, seed=0, multiple_of=4))
    assert [len(examples.index) for examples in batch.values()] == [4, 4]


def test_every_record_comes_once_an_epoch_and_each_epoch_is_shuffled_anew():
    # Two of the six records a batch: an epoch takes three batches.
    drawn = indices(take(training_batches(two_sources(), FIELDS, seed=0), 12), "few")
    epochs = [drawn[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_epochs_may_end_within_a_batch():
    mixture = Mixture({"a": component(5)}, batch_size=3)
    drawn = indices(take(training_batches(mixture, FIELDS, seed=0), 10), "a")
    assert collections.Counter(drawn) == dict.fromkeys(range(5), 6)


def test_the_seed_decides_the_order():
    def order(seed):
        return indices(take(training_batches(two_sources(), FIELDS, seed), 5), "many")

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_a_source_is_drawn_alike_whatever_it_is_mixed_with():
    together = two_sources()
    alone = Mixture({"many": together.components["many"]}, batch_size=6)
    expected = indices(take(training_batches(together, FIELDS, seed=4), 6), "many")
    assert indices(take(training_batches(alone, FIELDS, seed=4), 6), "many") == expected


def test_sources_of_one_size_come_in_different_orders():
    mixture = Mixture({"a": component(9), "b": component(9)}, batch_size=6)
    batches = take(training_batches(mixture, FIELDS, seed=0), 3)
    assert indices(batches, "a") != indices(batches, "b")


def add_noise(record, rng):
    return record | {"value": record["value"] + np.float32(rng.uniform())}


def augmented():
    return Mixture({"a": component(4, augment=add_noise)}, batch_size=4)


def test_augmentation_is_random_by_epoch_and_fixed_by_the_seed():
    def epochs(seed):
        batches = take(training_batches(augmented(), FIELDS, seed), 3)
        return [b["a"].targets["size"][np.argsort(b["a"].index)] for b in batches]

    first, second, third = epochs(0)
    np.testing.assert_array_equal(np.floor(first), [0, 1, 2, 3])
    assert len({*first % 1, *second % 1, *third % 1}) == 12
    np.testing.assert_array_equal([first, second, third], epochs(0))
    assert not np.array_equal(first, epochs(1)[0])


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("mixture", [two_sources(), augmented()], ids=["two", "noisy"])
def test_a_restored_iterator_goes_on_where_it_stood(mixture, steps):
    batches = training_batches(mixture, FIELDS, seed=2)
    take(batches, steps)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 4)
    restored = training_batches(mixture, FIELDS, seed=2)
    restored.set_state(state)
    for ours, theirs in zip(take(restored, 4), expected, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name].index, theirs[name].index)
            np.testing.assert_array_equal(
                ours[name].targets["size"], theirs[name].targets["size"]
            )


def test_reading_ahead_changes_nothing():
    few, many = (
        indices(
            take(training_batches(two_sources(), FIELDS, 0, prefetch=prefetch), 6),
            "many",
        )
        for prefetch in (1, 16)
    )
    assert few == many


def test_a_source_of_weight_0_is_never_read():
    class Unreadable(Numbers):
        def __getitem__(self, index):
            raise AssertionError

    idle = Component(Unreadable(3), Unreadable(3), ("size",), weight=0.0)
    mixture = Mixture({"a": component(), "idle": idle}, batch_size=4)
    assert set(next(training_batches(mixture, FIELDS, seed=0))) == {"a"}


@pytest.mark.parametrize(("batch_size", "num_batches"), [(7, 1), (3, 3), (10, 1)])
def test_evaluation_covers_the_test_records_once_in_order(batch_size, num_batches):
    batches = list(evaluation_batches(component(), FIELDS, batch_size))
    assert len(batches) == num_batches
    assert all(len(examples.index) == batch_size for examples in batches)
    real = np.concatenate([e.index[e.mask["size"]] for e in batches])
    assert real.tolist() == list(range(7))
    for examples in batches:
        np.testing.assert_array_equal(examples.targets["size"], examples.index)


def test_evaluation_of_some_records():
    (examples,) = evaluation_batches(component(), FIELDS, 4, num_examples=2)
    assert examples.index[examples.mask["size"]].tolist() == [0, 1]
    whole = list(evaluation_batches(component(), FIELDS, 4, num_examples=100))
    assert sum(int(e.mask["size"].sum()) for e in whole) == 7


@dataclasses.dataclass(frozen=True)
class Noted(Numbers):
    """Remembers which records were read."""

    read: list = dataclasses.field(default_factory=list)

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def mixed():
    noisy = component(20, first=100, weight=3.0, augment=add_noise)
    return Mixture({"few": component(6), "noisy": noisy}, batch_size=16)


# Contiguous rows, rows in turns, and rows that two of four processes share.
@pytest.mark.parametrize(
    "rows",
    [
        [lambda n: np.arange(n // 2), lambda n: np.arange(n // 2, n)],
        [lambda n: np.arange(0, n, 2), lambda n: np.arange(1, n, 2)],
        [lambda n: np.arange(n // 2), lambda n: np.arange(n // 2, n)] * 2,
    ],
)
def test_processes_read_their_rows_of_the_same_batches(rows):
    whole = take(training_batches(mixed(), FIELDS, 0, 2), 5)
    for of_process in rows:
        mixture = mixed()
        batches = training_batches(mixture, FIELDS, 0, 2, prefetch=1, rows=of_process)
        for ours, theirs in zip(take(batches, 5), whole, strict=True):
            for name, examples in theirs.items():
                here = of_process(len(examples.index))
                jax.tree.map(
                    lambda a, b, here=here: np.testing.assert_array_equal(a, b[here]),
                    ours[name],
                    examples,
                )
        assert batches.get_state() == {"next_index": 5}


def test_processes_read_no_records_of_others():
    source = Noted(12)
    mixture = Mixture({"a": Component(source, source, ("size",))}, batch_size=4)
    batches = training_batches(
        mixture, FIELDS, 0, prefetch=1, rows=lambda n: np.arange(n // 2)
    )
    used = indices(take(batches, 3), "a")
    assert len(used) == 6
    del batches
    # A thread may be ahead, by whole batches.
    assert source.read[:6] == used


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_processes_evaluate_their_rows_of_the_same_batches(batch_size):
    source = Noted(7)
    noted = Component(source, source, ("size",))
    whole = list(evaluation_batches(component(), FIELDS, batch_size))
    ours = list(
        evaluation_batches(noted, FIELDS, batch_size, rows=lambda n: np.arange(1, n, 2))
    )
    for mine, examples in zip(ours, whole, strict=True):
        np.testing.assert_array_equal(mine.index, examples.index[1::2])
        np.testing.assert_array_equal(mine.inputs, examples.inputs[1::2])
        np.testing.assert_array_equal(mine.mask["size"], examples.mask["size"][1::2])
    read = {int(i) for mine in ours for i in mine.index}
    assert set(source.read) == read
