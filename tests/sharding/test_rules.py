import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from mtl_jax.sharding import Rules, make_mesh, param_shardings, spec
from mtl_jax.sharding.mesh import AXES
from mtl_jax.sharding.rules import check_rules


def boxed(shape, names):
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nn.LogicallyPartitioned(array, names)


def test_names_become_mesh_axes():
    names = ("expert", "embed", "mlp")
    assert spec(Rules(), names) == PartitionSpec("expert", "fsdp", "model")
    assert spec(Rules(), (None, "task")) == PartitionSpec(None, None)
    batch = PartitionSpec(("data", "fsdp", "expert"), None)
    assert spec(Rules(), ("batch", None)) == batch
    assert spec(Rules(embed=None), ("embed",)) == PartitionSpec(None)


def test_a_misspelt_field_is_a_type_error():
    with pytest.raises(TypeError, match="heds"):
        Rules(heds="model")  # pyright: ignore[reportCallIssue]


def test_a_misspelt_name_tells_the_nearest():
    with pytest.raises(ValueError, match=r"'expret'.*did you mean 'expert'"):
        spec(Rules(), ("expret", "embed"))


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(batch=None, embed=("fsdp", "model")),
        Rules(batch="data", expert=()),
    ],
)
def test_rules_that_fit_their_mesh(rules):
    check_rules(rules, AXES)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            Rules(tokens="nope"),
            "rules.tokens is 'nope'; choose from the mesh axes data",
        ),
        (Rules(embed=("fsdp", "nope")), r"rules.embed is \('fsdp', 'nope'\)"),
        (Rules(batch=("data", "data")), "rules.batch is .*, each at most once"),
        (Rules(batch="model"), "choose from the mesh axes data, fsdp, expert, each"),
    ],
)
def test_rules_that_do_not_fit_their_mesh(rules, expected):
    with pytest.raises(ValueError, match=expected):
        check_rules(rules, AXES)


@pytest.mark.parametrize(
    ("rules", "names", "axis"),
    [
        (Rules(), ("mlp", "heads"), "model"),
        (Rules(embed="expert"), ("expert", "embed"), "expert"),
        (Rules(), ("batch", "embed"), "fsdp"),
    ],
)
def test_a_mesh_axis_used_twice_is_an_error(rules, names, axis):
    with pytest.raises(ValueError, match=f"mesh axis '{axis}' twice"):
        spec(rules, names)


def test_flax_reads_the_rules_alike():
    names = ("expert", "embed", "mlp")
    flax_spec = nn.logical_to_mesh_axes(names, Rules().as_flax_rules())
    assert flax_spec == spec(Rules(), names)


def test_parameters_are_born_sharded():
    mesh = make_mesh(fsdp=2, expert=4)
    kernel = nn.with_logical_partitioning(nn.initializers.ones, ("expert", "embed"))

    def init():
        return {"kernel": kernel(jax.random.key(0), (8, 6)), "plain": jnp.zeros(3)}

    shardings = param_shardings(jax.eval_shape(init), mesh, Rules())
    params = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()
    shapes = {shard.data.shape for shard in params["kernel"].addressable_shards}
    assert shapes == {(2, 3)}
    assert params["plain"].sharding.is_fully_replicated
    np.testing.assert_array_equal(params["kernel"], np.ones((8, 6)))


def test_a_shape_that_does_not_divide_names_parameter_shape_and_axis():
    variables = {"params": {"experts": boxed((6, 4), ("expert", "embed"))}}
    with pytest.raises(
        ValueError,
        match=r"params/experts of shape \(6, 4\): axis 'expert' of size 6.*size 8",
    ):
        param_shardings(variables, make_mesh(expert=8), Rules())
    # A mesh axis of size 1 divides everything.
    param_shardings(variables, make_mesh(), Rules())


def test_errors_name_the_parameter():
    mesh = make_mesh()
    with pytest.raises(ValueError, match=r"parameter a: .*'embd'"):
        param_shardings({"a": boxed((4,), ("embd",))}, mesh, Rules())
    with pytest.raises(ValueError, match=r"parameter b of shape .* 1 logical axis"):
        param_shardings({"b": boxed((4, 4), ("embed",))}, mesh, Rules())
    with pytest.raises(ValueError, match=r"parameter c: .*embed='pipe'"):
        param_shardings({"c": boxed((4,), ("embed",))}, mesh, Rules(embed="pipe"))
