import jax
import numpy as np

from mtl_jax.data import Examples, stack_records


def record(value):
    return {
        "image": np.full((2, 2, 1), value, np.uint8),
        "digit": np.array(value, np.int32),
        "height": np.full((2, 2), value, np.float32),
    }


RECORDS = [(7, record(1)), (3, record(2)), (9, record(3))]
FIELDS = {"class": "digit", "elevation": "height"}


def test_records_are_stacked_in_order():
    examples = stack_records(RECORDS, "image", FIELDS)
    assert examples.inputs.shape == (3, 2, 2, 1)
    assert examples.inputs.dtype == np.uint8
    assert examples.inputs[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert set(examples.targets) == set(examples.mask) == {"class", "elevation"}
    assert examples.targets["class"].tolist() == [1, 2, 3]
    assert examples.targets["elevation"].shape == (3, 2, 2)
    assert all(mask.tolist() == [True] * 3 for mask in examples.mask.values())
    assert examples.index.tolist() == [7, 3, 9]


def test_padding_repeats_the_records_masked_out():
    examples = stack_records(RECORDS[:2], "image", FIELDS, num_examples=5)
    assert examples.inputs[:, 0, 0, 0].tolist() == [1, 2, 1, 2, 1]
    assert examples.index.tolist() == [7, 3, 7, 3, 7]
    for mask in examples.mask.values():
        assert mask.tolist() == [True, True, False, False, False]


def test_other_input_fields_and_no_targets():
    examples = stack_records(RECORDS, "height", {})
    assert examples.inputs.dtype == np.float32
    assert examples.targets == examples.mask == {}


def test_examples_are_a_pytree():
    examples = stack_records(RECORDS, "image", FIELDS)
    doubled = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), examples)
    assert isinstance(doubled, Examples)
    assert doubled.index.tolist() == [7, 3, 9, 7, 3, 9]
    # Input, index, and two each of targets and masks.
    assert len(jax.tree.leaves(examples)) == 6
