"""Models whose tasks have routers of their own: on a mesh as on one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.heads import Classification, DensePrediction
from mtl_jax.layers.moe import MoE, MoeAttention
from mtl_jax.layers.moe.gates import TaskConditionedGate
from mtl_jax.layers.moe.losses import mutual_information
from mtl_jax.layers.moe.routers import M3ViT, ModSquad
from mtl_jax.layers.moe.routers.m3vit import released_init
from mtl_jax.models import MultitaskModel, VisionTransformer
from mtl_jax.models.multitask import repeat
from mtl_jax.sharding import Rules, make_mesh, param_shardings, spec

pytestmark = pytest.mark.slow

RULES = Rules()
EXPERTS = 8
IMAGES = jax.random.uniform(jax.random.key(0), (16, 8, 8, 3), minval=-1)
HEADS = {
    "surface": DensePrediction(patch_size=4, num_classes=2),
    "height": DensePrediction(patch_size=4),
    "digit": Classification(num_classes=10),
}


def model(router, **fields):
    moe = functools.partial(
        MoE,
        num_experts=EXPERTS,
        expert_hidden=8,
        group_size=2,
        capacity_factor=None,
        router=router,
    )
    trunk = VisionTransformer(
        width=8, depth=2, num_heads=2, patch_size=4, num_tasks=3, moe=moe, **fields
    )
    return MultitaskModel(trunk, HEADS)


# As the configs m3vit and mod_squad have them.
MODELS = {
    "multi-gate M3ViT": model(M3ViT, class_token="inside", final_norm=False),
    "task-conditioned M3ViT": model(
        functools.partial(
            M3ViT,
            gate=functools.partial(
                TaskConditionedGate, as_released=True, kernel_init=released_init
            ),
        )
    ),
    "Mod-Squad": model(
        ModSquad,
        task_embedding=True,
        attention=(
            functools.partial(
                MoeAttention, num_experts=EXPERTS, head_width=4, router=ModSquad
            ),
            functools.partial(SelfAttention, head_width=4),
        ),
    ),
}


def abstract(model):
    inputs = dict.fromkeys(HEADS, jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype))
    return jax.eval_shape(lambda: model.init(jax.random.key(1), inputs))


def parameters(model):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.float32(0.4 * rng.normal(size=leaf.shape)),
        nn.unbox(abstract(model)),
    )


def value_and_gradients(model, params, images):
    """Of a pass of every task: predictions, auxiliary losses and that of all tasks."""

    def loss(params, images):
        output = model.apply_trunk(
            repeat(params["trunk"], 3),
            images,
            tuple(HEADS),
            train=True,
            key=jax.random.key(2),
        )
        predictions = {
            task: model.apply_head(params["heads"][task], output.features[i], task)
            for i, task in enumerate(HEADS)
        }
        joint = {
            name: mutual_information(layer["gates"])
            for name, layer in output.statistics.items()
        }
        total = sum(jnp.mean(jnp.sin(x)) for x in predictions.values())
        total += jnp.sum(output.auxiliary_loss) + sum(joint.values())
        return total, (predictions, joint, output.statistics)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, images)


@functools.cache
def on_one_device(name):
    run = jax.jit(functools.partial(value_and_gradients, MODELS[name]))
    return jax.device_get(run(parameters(MODELS[name]), IMAGES))


@pytest.mark.parametrize(
    "sizes", [{"data": 1, "expert": 8}, {"data": 2, "expert": 4}], ids=["1x8", "2x4"]
)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_one_device(name, sizes):
    model, mesh = MODELS[name], make_mesh(**sizes)
    shardings = param_shardings(abstract(model), mesh, RULES)
    batch = NamedSharding(mesh, spec(RULES, ("batch",)))
    arguments = jax.device_put((parameters(model), IMAGES), (shardings, batch))
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(value_and_gradients, model))
        result = run(*arguments)
    (_, (_, joint, _)), (gradients, _) = expected = on_one_device(name)

    def compare(ours, theirs):
        # Of each array's largest entry, but keys' biases have no effect and gradients
        # that are rounding alone.
        scale = max(np.max(np.abs(theirs)), 1e-2)
        assert np.max(np.abs(np.asarray(ours) - theirs)) <= 1e-5 * scale

    jax.tree.map(compare, result, expected)
    layers = {"block_1"} | ({"block_0_attention"} if name == "Mod-Squad" else set())
    assert set(joint) == layers
    for layer in joint.values():
        assert layer < -0.01, "tasks that route alike would agree on any mesh"
    routers = jax.tree.leaves(gradients["trunk"]["block_1"]["moe"]["router"])
    assert all(np.max(np.abs(leaf)) > 1e-4 for leaf in routers)
    kernel = result[1][0]["trunk"]["block_1"]["moe"]["experts"]["up"]["kernel"]
    here = kernel.sharding.shard_shape(kernel.shape)
    assert here == (EXPERTS // sizes["expert"], 8, 8)
