"""Routers: one file each, a pure function and a thin Flax module."""

from mtl_jax.layers.moe.routers.expert_choice import ExpertChoice
from mtl_jax.layers.moe.routers.loss_free import LossFree
from mtl_jax.layers.moe.routers.m3vit import M3ViT
from mtl_jax.layers.moe.routers.mod_squad import ModSquad
from mtl_jax.layers.moe.routers.noisy_top_k import NoisyTopK
from mtl_jax.layers.moe.routers.soft import Soft
from mtl_jax.layers.moe.routers.switch import Switch

__all__ = [
    "ExpertChoice",
    "LossFree",
    "M3ViT",
    "ModSquad",
    "NoisyTopK",
    "Soft",
    "Switch",
]
