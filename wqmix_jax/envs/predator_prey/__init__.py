"""Predator-prey, the paper's first task."""

from wqmix_jax.envs.predator_prey.task import PredatorPrey as PredatorPrey
