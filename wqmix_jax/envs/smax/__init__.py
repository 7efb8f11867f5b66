"""SMAX, JaxMARL's StarCraft micromanagement in JAX. The viewer, which loads matplotlib, is imported when needed."""

from wqmix_jax.envs.smax.task import SMAX as SMAX
from wqmix_jax.envs.smax.task import map_names as map_names
