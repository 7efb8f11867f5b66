"""SMAX, StarCraft-like battles on the device (Rutherford et al. 2024, JaxMARL), as an environment of this package.

The game is that of JaxMARL, against its heuristic enemy. It is not StarCraft II: maps are flat, and the numbers of both
games are not comparable. JaxMARL is an optional extra, imported when the environment is first used.

In shapes, ``N`` is the number of allies (the agents) and ``U`` that of all units, allies first.
"""

import functools
import importlib.util
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from pydantic import Field

from wqmix_jax.envs.base import Environment, EnvState, External, ExternalPackage, without_weak_types
from wqmix_jax.envs.quiet_imports import quiet_imports
from wqmix_jax.errors import install_extra
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, PyTree, StepOutcome

NATIVE_MAX_RETURN = 2.0
"""SMAX's return of a won battle: half for the enemies' lost health, half for the victory."""

ZEALOT, ZERGLING = 3, 4
"""SMAX's numbers of these types."""


class Units(NamedTuple):
    """The part of a battle's state from which observations are computed, and which the replay stores.

    Attributes:
        position: ``[U, 2]`` float32, on the map.
        health: ``[U]`` float32.
        cooldown: ``[U]`` float32, seconds until the unit can shoot again.
        movement: ``[U, 2]`` float32, the direction of the unit's last step.
        attack: ``[U]`` uint8, the unit's last attack action, 0 for none.
        kind: ``[U]`` uint8, the unit's type.
        alive: ``[U]`` bool.
    """

    position: Array
    health: Array
    cooldown: Array
    movement: Array
    attack: Array
    kind: Array
    alive: Array


@options
class SMAX(Environment):
    """One of SMAC's battles, fought by learning allies against JaxMARL's heuristic enemy.

    Attributes:
        map: SMAC's name of the battle; ``corridor`` has SMAC's units but not its choke point.
        episode_limit: steps.
        max_return: the return of a won battle: 2 is SMAX's scale, 20 that of SMAC.
        see_enemy_actions: whether an observation shows the last actions of enemies in sight.
        walls_cause_death: whether a unit that touches the edge of the map dies.
        attack_mode: which of the units in range the heuristic shoots at.
    """

    map: str
    episode_limit: PositiveInt
    max_return: Annotated[float, Field(gt=0)]
    see_enemy_actions: bool
    walls_cause_death: bool
    attack_mode: Literal["closest", "random"]

    viewer_class: ClassVar[str | None] = "wqmix_jax.envs.smax.viewer:SMAXViewer"

    @pydantic.model_validator(mode="after")
    def _is_there(self) -> Self:
        if importlib.util.find_spec("jaxmarl") is None:
            raise ValueError(f"env=smax is not allowed: it needs jaxmarl, {install_extra('smax')}")
        if self.map not in map_names():
            raise ValueError(f"map={self.map} is not allowed: choose one of {', '.join(map_names())}")
        return self

    @property
    def game(self) -> Any:
        """JaxMARL's ``HeuristicEnemySMAX``."""
        return _game(self.map, self.episode_limit, self.see_enemy_actions, self.walls_cause_death, self.attack_mode)

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`."""
        return EnvSpec(
            num_agents=self.game.num_allies,
            num_actions=self.game.num_ally_actions,
            obs_dim=self.game.obs_size,
            state_dim=self.game.state_size,
            episode_limit=self.episode_limit,
        )

    def reset(self, key: PRNGKey) -> EnvState:
        """Places both armies on their sides of the map, with noise on their positions."""
        with jax.numpy_rank_promotion("allow"):
            return without_weak_types(self.game.reset(key)[1])

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Plays JaxMARL's ``step_env``, which unlike its ``step`` never resets."""
        actions = {agent: joint_action[index] for index, agent in enumerate(self.game.agents)}
        with jax.numpy_rank_promotion("allow"):
            _, env_state, rewards, _, _ = self.game.step_env(key, env_state, actions)
        env_state = without_weak_types(env_state)
        allies, enemies = self._alive(env_state)
        terminated = ~allies.any() | ~enemies.any()
        return env_state, StepOutcome(
            reward=rewards[self.game.agents[0]] * (self.max_return / NATIVE_MAX_RETURN),
            terminated=terminated,
            truncated=~terminated & (env_state.state.step >= self.episode_limit),
        )

    def observe(self, env_state: EnvState) -> Observation:
        """Returns each ally's list of the units in its sight, and all units as the state."""
        # One formula for both, so that an observation from the replay can't differ from that of play.
        return self.decompress(self.compress(env_state))

    def metrics(self, env_state: EnvState) -> dict[str, Array]:
        """Returns ``win_rate``, 1 if all enemies are dead and an ally is alive, and how many of each side died."""
        allies, enemies = self._alive(env_state)
        return {
            "win_rate": (allies.any() & ~enemies.any()).astype(jnp.float32),
            "dead_allies": (~allies).sum().astype(jnp.float32),
            "dead_enemies": (~enemies).sum().astype(jnp.float32),
        }

    @property
    def external(self) -> External:
        """The version of JaxMARL, on which the rules of the battles depend."""
        return ExternalPackage("jaxmarl")

    def compress(self, env_state: EnvState) -> Units:
        """Returns the units, which are far fewer bytes than each ally's view of them."""
        state = env_state.state
        return Units(
            position=state.unit_positions,
            health=state.unit_health,
            cooldown=state.unit_weapon_cooldowns,
            movement=state.prev_movement_actions,
            attack=state.prev_attack_actions.astype(jnp.uint8),
            kind=state.unit_types.astype(jnp.uint8),
            alive=state.unit_alive,
        )

    def decompress(self, compressed: PyTree) -> Observation:
        """Computes JaxMARL's features (``get_obs`` and ``get_world_state`` of its ``SMAX``) for all allies together.

        JaxMARL computes them pair by pair, which takes twice as long on a CPU.

        Returns:
            obs ``[N, obs_dim]``: the other units in their order, then the ally itself. state ``[state_dim]``: the own
            features of all units, their teams and their types. avail_actions ``[N, A]``: moves, stop, then one attack
            for each enemy.
        """
        game, units = self.game, compressed
        distance = jnp.linalg.norm(_offsets(game, units), axis=-1)
        kind, alive = units.kind.astype(jnp.int32), units.alive[: game.num_allies, None]
        in_range = distance < game.unit_type_attack_ranges[kind][: game.num_allies, None]
        can_attack = (alive & units.alive[None] & in_range)[:, game.num_allies :]
        # The dead can only stop, which every unit can.
        can_move = jnp.repeat(alive, game.num_movement_actions - 1, axis=1)
        return Observation(
            obs=_features_in_sight(game, units, distance, see_enemy_actions=self.see_enemy_actions),
            state=jnp.concatenate(
                [
                    _own_features(game, units, units.position, units.cooldown).reshape(-1),
                    game.teams.astype(jnp.float32),
                    units.kind.astype(jnp.float32),
                ]
            ),
            avail_actions=jnp.concatenate([can_move, jnp.ones_like(alive), can_attack], axis=1),
        )

    def _alive(self, env_state: EnvState) -> tuple[Array, Array]:
        alive = env_state.state.unit_alive
        return alive[: self.game.num_allies], alive[self.game.num_allies :]


def _offsets(game: Any, units: Units) -> Array:
    """Returns the vectors from each ally to each unit, ``[N, U, 2]``."""
    return units.position[None] - units.position[: game.num_allies, None]


def _features_in_sight(game: Any, units: Units, distance: Array, *, see_enemy_actions: bool) -> Array:
    """Returns each ally's features of the other units, in their order, then of itself: ``[N, obs_dim]``."""
    num_allies, num_units = game.num_allies, len(units.kind)
    kind, is_ally = units.kind.astype(jnp.int32), np.arange(num_units) < num_allies
    sight = game.unit_type_sight_ranges[kind][:num_allies, None]
    # The features of a unit that look the same to every ally, [U, 4 + types]: last move, last attack, weapon, type.
    last_attack = np.where(is_ally, game.num_ally_actions - 1, game.num_enemy_actions - 1)
    actions = jnp.concatenate([units.movement, (units.attack / last_attack)[:, None]], axis=1)
    shared = jnp.concatenate(
        [
            jnp.where((is_ally | see_enemy_actions)[:, None], actions, 0.0),
            _loaded(game, units)[:, None],
            jax.nn.one_hot(kind, len(game.unit_type_names)),
        ],
        axis=1,
    )
    health = jnp.broadcast_to(_health_share(game, units)[None, :, None], (num_allies, num_units, 1))
    features = jnp.concatenate(
        [
            health,
            _offsets(game, units) / sight[..., None],
            jnp.broadcast_to(shared[None], (num_allies, *shared.shape)),
        ],
        axis=2,
    )
    # Zeros for units out of sight and dead units, and in all rows of a dead ally.
    visible = (distance < sight) & units.alive[:num_allies, None] & units.alive[None]
    features = jnp.where(visible[..., None], features, 0.0)
    # Row i holds the U - 1 others: units before i are at their index, those after it one place earlier.
    before_itself = (np.arange(num_units - 1)[None] < np.arange(num_allies)[:, None])[..., None]
    others = jnp.where(before_itself, features[:, :-1], features[:, 1:])
    map_size = np.array([game.map_width, game.map_height], np.float32)
    itself = _own_features(game, units, units.position / map_size[None], _loaded(game, units))
    return jnp.concatenate([others.reshape(num_allies, -1), itself[:num_allies]], axis=1)


def _own_features(game: Any, units: Units, position: Array, cooldown: Array) -> Array:
    """Returns health, position, cooldown and type of each unit, zeros for the dead: ``[U, 4 + types]``."""
    kinds = jax.nn.one_hot(units.kind.astype(jnp.int32), len(game.unit_type_names))
    features = jnp.concatenate([_health_share(game, units)[:, None], position, cooldown[:, None], kinds], axis=1)
    return jnp.where(units.alive[:, None], features, 0.0)


def _health_share(game: Any, units: Units) -> Array:
    """Returns the share of health that is left, ``[U]``."""
    return units.health / game.unit_type_health[units.kind.astype(jnp.int32)]


def _loaded(game: Any, units: Units) -> Array:
    """Returns the remaining share of each weapon's cooldown, ``[U]``."""
    return jnp.clip(units.cooldown / game.unit_type_weapon_cooldowns[units.kind.astype(jnp.int32)], 0.0, 1.0)


def map_names() -> list[str]:
    """Returns the names of SMAC's battles that can be played."""
    return [*_library().MAP_NAME_TO_SCENARIO, "corridor"]


@functools.cache
def _library() -> Any:
    """Imports JaxMARL's module of the game, in silence and outside of any trace: its maps are arrays."""
    with quiet_imports(), jax.ensure_compile_time_eval():
        from jaxmarl.environments.smax import smax_env
    return smax_env


@functools.cache
def _game(name: str, max_steps: int, see_enemy_actions: bool, walls_cause_death: bool, attack_mode: str) -> Any:
    """Returns one object per set of options: jax caches JaxMARL's jitted methods by their object.

    The object outlives the caller and holds arrays, so these must be concrete even while a function is being traced.
    """
    with jax.ensure_compile_time_eval():
        from jaxmarl.environments.smax import HeuristicEnemySMAX

        return HeuristicEnemySMAX(
            scenario=_scenario(name),
            max_steps=max_steps,
            see_enemy_actions=see_enemy_actions,
            walls_cause_death=walls_cause_death,
            attack_mode=attack_mode,
        )


def _scenario(name: str) -> Any:
    library = _library()  # has all of SMAC's battles but corridor
    if name != "corridor":
        return library.MAP_NAME_TO_SCENARIO[name]
    kinds = jnp.array([ZEALOT] * 6 + [ZERGLING] * 24, jnp.uint8)
    return library.Scenario(kinds, 6, 24, smacv2_position_generation=False, smacv2_unit_type_generation=False)
