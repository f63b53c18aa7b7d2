import functools

import fiddle as fdl
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FOLDER, expected

from mtl_jax.layers.heads import Classification
from mtl_jax.layers.patch import resize_positions
from mtl_jax.models import MultitaskModel
from mtl_jax.models.pretrained import (
    convert_dinov2,
    load_huggingface,
    start,
    warm_start,
)

LOAD = functools.partial(
    load_huggingface, FOLDER / "dinov2_with_registers", convert_dinov2
)
IMAGES = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.uint8)


def model(**changes):
    trunk = LOAD().trunk
    for name, value in changes.items():
        setattr(trunk, name, value)
    return MultitaskModel(fdl.build(trunk), {"digit": Classification(3)})


@functools.cache
def fresh(**changes):
    shapes = jax.eval_shape(
        lambda key: model(**changes).init(key, {"digit": IMAGES}), jax.random.key(0)
    )
    return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), nn.unbox(shapes))


def test_the_trunk_is_published_and_heads_stay_fresh():
    params = warm_start(fresh(), load=LOAD)
    jax.tree.map(np.testing.assert_array_equal, params["heads"], fresh()["heads"])
    golden = expected("dinov2_with_registers")
    output = jax.jit(model().trunk.apply)(
        {"params": params["trunk"]}, golden["trained/images"]
    )
    np.testing.assert_allclose(output, golden["trained/patches"], rtol=1e-5, atol=1e-5)


def test_leaves_stay_on_the_host_until_they_are_placed():
    leaves = jax.tree.leaves(warm_start(fresh(), load=LOAD)["trunk"])
    assert {type(leaf) for leaf in leaves} == {np.ndarray}
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def test_positions_are_resized_to_the_trunks_grid(capsys):
    params = fresh(position_grid=(2, 5))
    started = warm_start(params, load=LOAD)["trunk"]["positions"]
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "parameters from a published trunk"
    assert lines[0].startswith("  as they are: ")
    assert lines[1:] == [
        "  of another shape: 1 (trunk/positions (3, 3, 8) -> (2, 5, 8))",
        "  stay fresh: 2 (heads/digit/logits/bias, heads/digit/logits/kernel)",
    ]
    positions = jnp.asarray(LOAD().params["positions"])
    resized = resize_positions(positions, 2, 5, antialias=True)
    np.testing.assert_allclose(started, resized, rtol=1e-6)
    # As it is checked before a run, by shapes alone.
    shapes = jax.eval_shape(functools.partial(warm_start, load=LOAD), params)
    assert shapes["trunk"]["positions"].shape == (2, 5, 8)
    assert capsys.readouterr().out == ""


def test_blocks_are_stacked_for_a_scan_over_them():
    params = warm_start(fresh(scan=True), load=LOAD)
    golden = expected("dinov2_with_registers")
    trunk = model(scan=True).trunk
    features = jax.jit(trunk.apply)(
        {"params": params["trunk"]}, golden["trained/images"]
    )
    np.testing.assert_allclose(
        features, golden["trained/patches"], rtol=1e-5, atol=1e-5
    )


def test_stacked_blocks_are_in_order():
    # Four blocks, of which a scan repeats two.
    published = {f"block_{i}/a/b": np.float32(i)[None] for i in range(4)}
    published["norm/scale"] = np.zeros(1)
    stacked = start._stacked(published, 2)
    assert set(stacked) == {"norm/scale", "blocks/block_0/a/b", "blocks/block_1/a/b"}
    assert stacked["blocks/block_0/a/b"].tolist() == [[0], [2]]
    assert stacked["blocks/block_1/a/b"].tolist() == [[1], [3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "the file lacks: block_2/attention/key/bias, .*; take the"),
        ({"depth": 1}, "the trunk lacks: block_1/attention_norm/scale, "),
        (
            {"mlp_ratio": 3.0},
            r"of other sizes: block_0/mlp/down/kernel \(\(16, 8\) in the file, "
            r"\(24, 8\) in the trunk\)",
        ),
        ({"position_grid": None}, "the trunk lacks: positions; take the fields"),
    ],
)
def test_another_trunk_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        warm_start(fresh(**changes), load=LOAD)
