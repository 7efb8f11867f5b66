"""SMAX, JaxMARL's StarCraft micromanagement in JAX."""

from wqmix_jax.envs.smax.task import SMAX as SMAX
