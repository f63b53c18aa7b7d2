"""How each kind of method turns a batch into gradients: the step builders.

Each takes what makes the method, for so many tasks, and gives a function from a problem
to a `Rule`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from small_problems import Problem

from mtl_jax import optim
from mtl_jax.optim.task_gradients import gradients_by_task


class Rule(NamedTuple):
    """How a method makes gradients for one problem.

    Attributes:
      init: `(params, batch) -> state`.
      gradient: `(params, state, batches, key) -> (gradient, state)`.
      observe: `(params, state, batch) -> state`, after the update.
      num_batches: How many batches a step draws.
    """

    init: Callable[..., Any]
    gradient: Callable[..., tuple[PyTree, Any]]
    observe: Callable[..., Any] = lambda params, state, batch: state
    num_batches: int = 1


RuleMaker = Callable[[Problem], Rule]
AggregatorMaker = Callable[[int], optim.Aggregator]
BalancerMaker = Callable[[int], optim.Balancer]


def at_params(make: AggregatorMaker, num_batches: int = 1) -> RuleMaker:
    """Task gradients at the trunk's parameters; a head gets its own gradient."""

    def build(problem: Problem) -> Rule:
        aggregator = make(len(problem.tasks))

        def differentiate(params, batch):
            features, pull_back = jax.vjp(
                lambda trunk: problem.features(trunk, batch), params["trunk"]
            )
            losses, rows, heads = gradients_by_task(
                problem.feature_losses,
                [features] * len(problem.tasks),
                params["heads"],
                batch,
            )
            pulled = [pull_back(row)[0] for row in rows]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pulled)
            return losses, stacked, heads

        def gradient(params, state, batches, key):
            del key
            losses, rows, heads = differentiate(params, batches[0])
            others = zip(("second", "third"), batches[1:], strict=False)
            extra = {name: differentiate(params, batch)[1] for name, batch in others}
            trunk, state = aggregator.update(
                rows, state, params["trunk"], losses=losses, **extra
            )
            return {"trunk": trunk, "heads": heads}, state

        def init(params, batch):
            del batch
            return aggregator.init(params["trunk"])

        return Rule(init, gradient, num_batches=num_batches)

    return build


def at_features(make: AggregatorMaker) -> RuleMaker:
    """Task gradients at the trunk's features, and one pass back through the trunk."""

    def build(problem: Problem) -> Rule:
        aggregator = make(len(problem.tasks))
        evaluate = optim.at_representation(
            problem.features, problem.feature_losses, aggregator
        )
        return _evaluated(
            lambda trunk, heads, state, key, batch: evaluate(
                trunk, heads, state, batch
            ),
            lambda params, batch: aggregator.init(
                problem.features(params["trunk"], batch)
            ),
        )

    return build


def balanced(make: BalancerMaker) -> RuleMaker:
    """One backward pass of weighted losses, through trunk and heads."""

    def build(problem: Problem) -> Rule:
        balancer = make(len(problem.tasks))

        def gradient(params, state, batches, key):
            del key
            losses, pull_back = jax.vjp(
                lambda params: problem.losses(params, batches[0]), params
            )
            weights, state = balancer.weights(losses, state)
            return pull_back(weights)[0], state

        def observe(params, state, batch):
            if balancer.observe is None:
                return state
            return balancer.observe(problem.losses(params, batch), state)

        return Rule(lambda params, batch: balancer.init(), gradient, observe)

    return build


def sharp(wrap: Callable[..., Any], **options: Any) -> RuleMaker:
    """The gradient of the summed losses, made sharpness-aware."""

    def build(problem: Problem) -> Rule:
        def total(params, batch):
            return jnp.sum(problem.losses(params, batch))

        return _scalar(wrap(jax.value_and_grad(total), **options))

    return build


def saliency_regularized(problem: Problem) -> Rule:
    """The logarithms of the losses, and Rep-MTL's regulariser of their saliencies."""
    log_losses = {
        name: lambda *args, loss=loss: jnp.log(loss(*args))
        for name, loss in problem.feature_losses.items()
    }

    def total(params, batch):
        features = problem.features(params["trunk"], batch)
        regularizer, losses = optim.rep_mtl_regularizer(
            log_losses, params["heads"], features, batch
        )
        return jnp.sum(losses) + regularizer

    return _scalar(jax.value_and_grad(total))


def flat(make: AggregatorMaker, rho: float, adaptive: bool = False) -> RuleMaker:
    """Task-based flat regions around an aggregator."""

    def build(problem: Problem) -> Rule:
        aggregator = make(len(problem.tasks))
        evaluate = optim.flat_value_and_grad(
            problem.task_losses, aggregator, rho, adaptive=adaptive
        )
        return _evaluated(
            lambda trunk, heads, state, key, batch: evaluate(
                trunk, heads, state, batch
            ),
            lambda params, batch: optim.flat_regions(aggregator).init(params["trunk"]),
        )

    return build


def samo(make: AggregatorMaker, rho: float) -> RuleMaker:
    """Steps uphill shared by the tasks, around an aggregator."""

    def build(problem: Problem) -> Rule:
        aggregator = make(len(problem.tasks))
        return _evaluated(
            optim.samo(problem.task_losses, aggregator, rho),
            lambda params, batch: aggregator.init(params["trunk"]),
        )

    return build


def _evaluated(evaluate: Callable[..., Any], init: Callable[..., Any]) -> Rule:
    """A rule of `(trunk, heads, state, key, batch) -> (losses, gradient, state)`."""

    def gradient(params, state, batches, key):
        _, (trunk, heads), state = evaluate(
            params["trunk"], params["heads"], state, key, batches[0]
        )
        return {"trunk": trunk, "heads": heads}, state

    return Rule(init, gradient)


def _scalar(value_and_grad: Callable[..., tuple[Any, PyTree]]) -> Rule:
    """A stateless rule of `(params, batch) -> (value, gradient)`."""

    def gradient(params, state, batches, key):
        del key
        return value_and_grad(params, batches[0])[1], state

    return Rule(lambda params, batch: None, gradient)
