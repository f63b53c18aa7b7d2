import dataclasses
import functools
import json
import subprocess
import sys
import sysconfig

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from small import experiment

from mtl_jax.layers.moe import MoeAttention
from mtl_jax.layers.moe.routers import LossFree
from mtl_jax.train import build_program, export_task, write_export
from mtl_jax.train.evaluate import make_predict

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)

ALONE = """
import json, sys
sys.path.append(sys.argv[1])
sys.modules["mtl_jax"] = None  # from now on it cannot be imported
import jax, jax.export, numpy
with open("bright.jaxexport", "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
assert json.load(open("bright.json"))["output"]["class_names"] == ["dark", "bright"]
images = numpy.load("images.npy")
numpy.save("all.npy", exported.call(images))
numpy.save("one.npy", exported.call(images[:1]))
assert not [name for name in sys.modules if name.startswith("mtl_jax.")]
"""


@functools.cache
def trained():
    program = build_program(experiment(), jax.devices()[:1])
    return program, program.fresh_state()


@functools.cache
def exported(task):
    return export_task(*trained(), task)


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    """Optax's schedules and its Adam mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def random_like(state):
    """The state with parameters at random, gates that start at zero among them."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), state.params
    )
    return dataclasses.replace(state, params=params)


def predicted(program, state, source, task, images):
    predict = jax.jit(make_predict(program.objective, source))
    return np.asarray(predict(state.variables, images)[task])


def test_a_process_with_jax_alone_gets_the_same_numbers(tmp_path):
    expected = predicted(*trained(), "tiles", "bright", IMAGES)
    write_export(tmp_path / "bright.jaxexport", *exported("bright"))
    np.save(tmp_path / "images.npy", IMAGES)
    subprocess.run(
        [sys.executable, "-S", "-c", ALONE, sysconfig.get_path("purelib")],
        cwd=tmp_path,
        env={"JAX_PLATFORMS": "cpu"},
        check=True,
    )
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), expected, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "one.npy"), expected[:1], atol=1e-5)


def test_one_program_is_for_all_platforms_and_any_number_of_images():
    data, description = exported("bright")
    program = jax.export.deserialize(bytearray(data))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert str(program.in_avals[0].shape) == "(batch, 8, 8, 3)"
    json.dumps(description)
    assert description["input"]["shape"] == ["batch", 8, 8, 3]
    assert description["output"]["shape"] == ["batch", 8, 8, 2]
    # Kernels of one platform are custom calls; there must be none.
    assert "tpu_custom_call" not in program.mlir_module()


def test_what_is_in_it_is_what_the_task_needs():
    _, state = trained()
    trunk, head = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        for tree in (state.params["trunk"], state.params["heads"]["bright"])
    )
    size = len(exported("bright")[0])
    # Half a kilobyte of program an operation; far less than another copy.
    assert trunk + head < size < trunk + head + 100_000


@pytest.mark.parametrize(
    ("fields", "batch"),
    [({"num_experts": 0}, None), ({"num_routers": None}, 2)],
    ids=["dense", "shared router, fixed batch"],
)
def test_other_models_and_a_fixed_batch(fields, batch):
    program = build_program(experiment(**fields), jax.devices()[:1])
    state = program.fresh_state()
    data, description = export_task(program, state, "redness", batch=batch)
    assert description["input"]["shape"][0] == (batch or "batch")
    assert description["output"]["kind"] == "values"
    images = IMAGES[:batch]
    output = jax.export.deserialize(bytearray(data)).call(images)
    expected = predicted(program, state, "tiles", "redness", images)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.slow
def test_heads_that_are_experts_need_the_number_of_images():
    heads = functools.partial(MoeAttention, num_experts=4)
    trunk = experiment().trunk.clone(attention=heads)
    program = build_program(experiment(trunk=trunk), jax.devices()[:1])
    state = random_like(program.fresh_state())
    with pytest.raises(ValueError, match="needs to know the number of images; give"):
        export_task(program, state, "bright")
    data, description = export_task(program, state, "bright", batch=3)
    assert description["input"]["shape"] == [3, 8, 8, 3]
    output = jax.export.deserialize(bytearray(data)).call(IMAGES[:3])
    expected = predicted(program, state, "tiles", "bright", IMAGES[:3])
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_biases_that_choose_experts_are_in_the_program():
    chosen = experiment(num_routers=None)
    layer = functools.partial(chosen.trunk.moe, router=LossFree)
    program = build_program(
        experiment(num_routers=None, trunk=chosen.trunk.clone(moe=layer)),
        jax.devices()[:1],
    )
    fresh = random_like(program.fresh_state())
    # Far enough apart that two of four experts are all that any token goes to.
    biases = jax.tree.map(
        lambda leaf: jnp.float32([0, 9, 0, 9]).reshape(leaf.shape), fresh.collections
    )
    state = dataclasses.replace(fresh, collections=biases)
    data, _ = export_task(program, state, "redness")
    output = jax.export.deserialize(bytearray(data)).call(IMAGES)
    expected = predicted(program, state, "tiles", "redness", IMAGES)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    without = predicted(program, fresh, "tiles", "redness", IMAGES)
    assert np.max(np.abs(without - expected)) > 0.01


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(ValueError, match="task is 'depth'; the run has bright, red"):
        export_task(*trained(), "depth")
    with pytest.raises(ValueError, match="batch is 0; it must be a positive mult"):
        export_task(*trained(), "bright", batch=0)
    with pytest.raises(ValueError, match="choose another ending"):
        write_export(tmp_path / "a.json", b"", {})


def test_it_is_not_written_through_links(tmp_path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("precious")
    for name in (".a.bin.tmp", ".a.json.tmp", "a.bin", "a.json"):
        (run / name).symlink_to(victim)
    write_export(run / "a.bin", b"program", {"task": "a"})
    assert victim.read_text() == "precious"
    assert (run / "a.bin").read_bytes() == b"program"
    assert json.loads((run / "a.json").read_text()) == {"task": "a"}
