"""Multitask optimization: task gradients in, one gradient out.

Stands alone: needs JAX and Optax, and works with any model. Each method that looks only
at the Gramian has its pure function too, for those who bring a Gramian:
`from mtl_jax.optim.mgda import weights`.
"""

from mtl_jax.optim import intervals
from mtl_jax.optim.aggregator import (
    Aggregator,
    AggregatorState,
    RowState,
    chain_after,
    conflict_rate,
    cosine_similarity,
    cross_gramian,
    from_rows,
    from_weights,
    gramian,
    weighted_sum,
)
from mtl_jax.optim.aligned_mtl import aligned_mtl
from mtl_jax.optim.awl import awl
from mtl_jax.optim.balancer import (
    Balancer,
    BalancerState,
    from_balancer,
    make_balancer,
)
from mtl_jax.optim.cagrad import cagrad
from mtl_jax.optim.canary import check_task_gradients
from mtl_jax.optim.conflict_free import conflict_free
from mtl_jax.optim.constant import constant
from mtl_jax.optim.db_mtl import db_mtl
from mtl_jax.optim.dualproj import dualproj
from mtl_jax.optim.dwa import dwa
from mtl_jax.optim.equal import equal
from mtl_jax.optim.every import EveryState, every
from mtl_jax.optim.excess_mtl import excess_mtl
from mtl_jax.optim.fairgrad import fairgrad
from mtl_jax.optim.famo import famo
from mtl_jax.optim.flat_regions import (
    FlatRegionsState,
    flat_regions,
    flat_value_and_grad,
)
from mtl_jax.optim.frank_wolfe import mgda_frank_wolfe
from mtl_jax.optim.gls import gls
from mtl_jax.optim.graddrop import graddrop
from mtl_jax.optim.gradnorm import gradnorm
from mtl_jax.optim.gradvac import gradvac
from mtl_jax.optim.grouped import grouped, where
from mtl_jax.optim.gsam import gsam
from mtl_jax.optim.imtl_g import imtl_g
from mtl_jax.optim.imtl_l import imtl_l
from mtl_jax.optim.mean import mean
from mtl_jax.optim.mgda import mgda
from mtl_jax.optim.moco import moco
from mtl_jax.optim.modo import modo
from mtl_jax.optim.momentum import MomentumState, momentum
from mtl_jax.optim.nash_mtl import nash_mtl
from mtl_jax.optim.normalize import NormalizeState, normalize
from mtl_jax.optim.ntkmtl import ntkmtl
from mtl_jax.optim.pcd import pcd
from mtl_jax.optim.pcgrad import pcgrad
from mtl_jax.optim.random import random
from mtl_jax.optim.rep_mtl import (
    cross_task_alignment,
    rep_mtl_regularizer,
    task_saliency_entropy,
)
from mtl_jax.optim.representation import at_representation
from mtl_jax.optim.rlw import rlw
from mtl_jax.optim.samo import samo
from mtl_jax.optim.scale_invariant import scale_invariant
from mtl_jax.optim.sdmgrad import sdmgrad
from mtl_jax.optim.sharpness import sharpness_aware
from mtl_jax.optim.simplex import from_cross_gramian
from mtl_jax.optim.stch import stch
from mtl_jax.optim.sum import sum
from mtl_jax.optim.task_prioritization import task_prioritization
from mtl_jax.optim.trimmed_mean import trimmed_mean
from mtl_jax.optim.uncertainty import uncertainty
from mtl_jax.optim.upgrad import upgrad
from mtl_jax.optim.uw_so import uw_so

__all__ = [
    "Aggregator",
    "AggregatorState",
    "Balancer",
    "BalancerState",
    "EveryState",
    "FlatRegionsState",
    "MomentumState",
    "NormalizeState",
    "RowState",
    "aligned_mtl",
    "at_representation",
    "awl",
    "cagrad",
    "chain_after",
    "check_task_gradients",
    "conflict_free",
    "conflict_rate",
    "constant",
    "cosine_similarity",
    "cross_gramian",
    "cross_task_alignment",
    "db_mtl",
    "dualproj",
    "dwa",
    "equal",
    "every",
    "excess_mtl",
    "fairgrad",
    "famo",
    "flat_regions",
    "flat_value_and_grad",
    "from_balancer",
    "from_cross_gramian",
    "from_rows",
    "from_weights",
    "gls",
    "graddrop",
    "gradnorm",
    "gradvac",
    "gramian",
    "grouped",
    "gsam",
    "imtl_g",
    "imtl_l",
    "intervals",
    "make_balancer",
    "mean",
    "mgda",
    "mgda_frank_wolfe",
    "moco",
    "modo",
    "momentum",
    "nash_mtl",
    "normalize",
    "ntkmtl",
    "pcd",
    "pcgrad",
    "random",
    "rep_mtl_regularizer",
    "rlw",
    "samo",
    "scale_invariant",
    "sdmgrad",
    "sharpness_aware",
    "stch",
    "sum",
    "task_prioritization",
    "task_saliency_entropy",
    "trimmed_mean",
    "uncertainty",
    "upgrad",
    "uw_so",
    "weighted_sum",
    "where",
]
