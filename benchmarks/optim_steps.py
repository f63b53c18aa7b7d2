"""Training steps of three tasks with a shared trunk, in JAX and the same in torch."""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torchjd.autojac import jac_to_grad, mtl_backward

# LibMTL's own __init__ imports a module that torchvision no longer has.
spec = importlib.util.find_spec("LibMTL")
sys.modules["LibMTL"] = types.ModuleType("LibMTL")
sys.modules["LibMTL"].__path__ = spec.submodule_search_locations  # type: ignore
libmtl = importlib.import_module("LibMTL.weighting")

NUM_TASKS, NUM_CLASSES, LEARNING_RATE = 3, 10, 1e-3

LIBMTL = {
    "pcgrad": (libmtl.PCGrad, {}),
    "gradvac": (libmtl.GradVac, {"beta": 0.5}),
    "mgda": (libmtl.MGDA, {"mgda_gn": "none"}),
    "cagrad": (libmtl.CAGrad, {"calpha": 0.4, "rescale": 0}),
    "imtl_g": (libmtl.IMTL, {}),
}
"""Name -> LibMTL's class and the arguments of its `backward`."""


class Convolutional(nn.Module):
    """A small convolutional trunk."""

    @nn.compact
    def __call__(self, x):
        for features in (32, 64, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return x.mean((1, 2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, deterministic=True)(y, y)
        y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(y))


class Transformer(nn.Module):
    """A small vision transformer trunk."""

    width: int = 128
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (4, 4), strides=(4, 4))(x)
        x = x.reshape(len(x), -1, self.width)
        shape = (1, *x.shape[1:])
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        for _ in range(self.depth):
            x = Block(self.width)(x)
        return nn.LayerNorm()(x).mean(1)


def peer_convolutional() -> torch.nn.Module:
    """The same convolutional trunk in torch."""
    layers: list[torch.nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [
            torch.nn.Conv2d(inputs, outputs, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.AvgPool2d(2),
        ]
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )


class PeerBlock(torch.nn.Module):
    """The same transformer block in torch."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.norm2 = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, 4, -1)
        y = torch.nn.functional.scaled_dot_product_attention(
            *qkv.permute(2, 0, 3, 1, 4)
        )
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        y = torch.nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")
        return x + self.down(y)


class PeerTransformer(torch.nn.Module):
    """The same vision transformer trunk in torch."""

    def __init__(self, width: int = 128, depth: int = 4):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, width, 4, stride=4)
        self.position = torch.nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = torch.nn.Sequential(*(PeerBlock(width) for _ in range(depth)))
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.norm(self.blocks(x)).mean(1)


class Case(NamedTuple):
    """A trunk in both libraries, the width of its features, and the batch size."""

    trunk: nn.Module
    make_peer: Callable[[], torch.nn.Module]
    width: int
    batch: int


CASES = {
    "CNN": Case(Convolutional(), peer_convolutional, 64, 32),
    "ViT": Case(Transformer(), PeerTransformer, 128, 16),
}


def make_batch(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[batch, 32, 32, 3]` and labels `[tasks, batch]`, the same for all."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, 32, 32, 3)).astype(np.float32)
    return images, rng.integers(0, NUM_CLASSES, (NUM_TASKS, size), dtype=np.int32)


class OurSteps:
    """Makes training steps with mtl_jax; each takes nothing and ends when done."""

    def __init__(self, case: Case):
        self.trunk = case.trunk
        self.images, self.labels = jax.device_put(make_batch(case.batch))
        self.optimizer = optax.sgd(LEARNING_RATE)
        self.features = jnp.zeros((case.batch, case.width))
        keys = jax.random.split(jax.random.key(0))
        heads = {
            "kernel": 0.1
            * jax.random.normal(keys[0], (NUM_TASKS, case.width, NUM_CLASSES)),
            "bias": jnp.zeros((NUM_TASKS, NUM_CLASSES)),
        }
        self.params = self.trunk.init(keys[1], self.images), heads
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def plain(self) -> Callable[[], None]:
        """One backward pass of the sum of the losses."""

        def gradient(params, images, labels):
            def total(params):
                features = self.trunk.apply(params[0], images)
                return jnp.sum(task_losses(features, params[1], labels))

            return jax.grad(total)(params)

        return self._timed(lambda p, _, *batch: (gradient(p, *batch), None), None)

    def forward(self) -> Callable[[], None]:
        """The losses alone."""

        def losses(params, images, labels):
            return task_losses(self.trunk.apply(params[0], images), params[1], labels)

        compiled = jax.jit(losses)
        return lambda: jax.block_until_ready(
            compiled(self.params, self.images, self.labels)
        )

    def at_params(self, make: Callable, together: bool) -> Callable[[], None]:
        """Task gradients at the trunk's parameters.

        Args:
          make: Number of tasks -> aggregator.
          together: Whether one mapped backward pass does all tasks, or one after
            another its own.
        """
        aggregator = make(NUM_TASKS)

        def gradient(params, state, images, labels):
            losses, rows, head_gradient, pull_back = self._heads(params, images, labels)
            if together:
                task_gradients = jax.vmap(pull_back)(rows)[0]
            else:
                pulled = [pull_back(row)[0] for row in rows]
                task_gradients = jax.tree.map(
                    lambda *leaves: jnp.stack(leaves), *pulled
                )
            combined, state = aggregator.update(task_gradients, state, losses=losses)
            return (combined, head_gradient), state

        return self._timed(gradient, aggregator.init(self.params[0]))

    def at_features(self, make: Callable) -> Callable[[], None]:
        """Task gradients at the trunk's features, then one backward pass."""
        aggregator = make(NUM_TASKS)

        def gradient(params, state, images, labels):
            losses, rows, head_gradient, pull_back = self._heads(params, images, labels)
            combined, state = aggregator.update(rows, state, losses=losses)
            return (pull_back(combined)[0], head_gradient), state

        return self._timed(gradient, aggregator.init(self.features))

    def _heads(self, params, images, labels):
        features, pull_back = jax.vjp(
            lambda trunk: self.trunk.apply(trunk, images), params[0]
        )
        losses, pull_heads = jax.vjp(
            lambda features, heads: task_losses(features, heads, labels),
            features,
            params[1],
        )
        rows, heads = jax.vmap(pull_heads)(jnp.eye(NUM_TASKS))
        head_gradient = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), heads)
        return losses, rows, head_gradient, pull_back

    def _timed(self, gradient: Callable, aggregator_state) -> Callable[[], None]:
        @functools.partial(jax.jit, donate_argnums=0)
        def step(carried, images, labels):
            params, optimizer_state, state = carried
            update, state = gradient(params, state, images, labels)
            update, optimizer_state = self.optimizer.update(update, optimizer_state)
            return optax.apply_updates(params, update), optimizer_state, state

        params = jax.tree.map(jnp.copy, self.params)
        carried = params, self.optimizer.init(params), aggregator_state

        def run():
            nonlocal carried
            carried = jax.block_until_ready(step(carried, self.images, self.labels))

        return run


def task_losses(features, heads, labels):
    """Mean cross-entropy of every task, `[tasks]`."""
    logits = jnp.einsum("bd,kdc->kbc", features, heads["kernel"])
    logits = logits + heads["bias"][:, None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), 1)


class TheirSteps:
    """Makes the same training steps with torch: plain, with TorchJD, with LibMTL."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.trunk = case.make_peer()
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(case.width, NUM_CLASSES) for _ in range(NUM_TASKS)
        )
        images, labels = make_batch(case.batch)
        self.images = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(labels, dtype=torch.int64)
        parameters = [*self.trunk.parameters(), *self.heads.parameters()]
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def _losses(self):
        self.optimizer.zero_grad()
        features = self.trunk(self.images)
        return features, [
            torch.nn.functional.cross_entropy(head(features), self.labels[k])
            for k, head in enumerate(self.heads)
        ]

    def plain(self) -> Callable[[], None]:
        """One backward pass of the sum of the losses."""

        def run():
            _, losses = self._losses()
            sum(losses).backward()
            self.optimizer.step()

        return run

    def torchjd(self, aggregator, together: bool) -> Callable[[], None]:
        """Task gradients at the trunk's parameters by TorchJD, as `OurSteps`."""
        ways = {} if together else {"parallel_chunk_size": 1, "retain_graph": True}

        def run():
            features, losses = self._losses()
            mtl_backward(losses, features=features, **ways)
            jac_to_grad(self.trunk.parameters(), aggregator)
            self.optimizer.step()

        return run

    def libmtl(self, name: str) -> Callable[[], None]:
        """Task gradients at the trunk's parameters by LibMTL, one after another."""
        cls, arguments = LIBMTL[name]
        weighting = cls()
        weighting.task_num, weighting.device = NUM_TASKS, torch.device("cpu")
        weighting.rep_grad, weighting.epoch = False, 0
        weighting.get_share_params = self.trunk.parameters
        weighting.zero_grad_share_params = functools.partial(
            self.trunk.zero_grad, set_to_none=False
        )
        weighting.init_param()

        def run():
            _, losses = self._losses()
            weighting.backward(torch.stack(losses), **arguments)
            self.optimizer.step()

        return run
