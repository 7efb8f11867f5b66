"""Predator-prey, the paper's first task.

The viewer and jumanji's interface are in modules that are imported when they are needed: they load matplotlib and
jumanji.
"""

from wqmix_jax.envs.predator_prey.task import CATCH as CATCH
from wqmix_jax.envs.predator_prey.task import DOWN as DOWN
from wqmix_jax.envs.predator_prey.task import LEFT as LEFT
from wqmix_jax.envs.predator_prey.task import RIGHT as RIGHT
from wqmix_jax.envs.predator_prey.task import STAY as STAY
from wqmix_jax.envs.predator_prey.task import UP as UP
from wqmix_jax.envs.predator_prey.task import EnvState as EnvState
from wqmix_jax.envs.predator_prey.task import Noise as Noise
from wqmix_jax.envs.predator_prey.task import PredatorPrey as PredatorPrey
