"""SMAX, StarCraft-like battles on the device (Rutherford et al. 2024, JaxMARL), behind our protocol.

The game is JaxMARL's own, against its heuristic enemy. It is not StarCraft II: maps are flat, and numbers from the two
are not comparable. JaxMARL is an optional extra, imported when the environment is first used.
"""

import contextlib
import functools
import importlib.util
import io
import sys
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from pydantic import Field

from wqmix_jax.envs.base import Environment, EnvState, External, ExternalPackage, without_weak_types
from wqmix_jax.errors import install_extra
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, PyTree, StepOutcome

NATIVE_MAX_RETURN = 2.0
"""Half for the enemies' lost health, half for the battle won."""

ZEALOT, ZERGLING = 3, 4


class Units(NamedTuple):
    """What of a battle is observed, of all ``U`` units, allies first; this is what the replay stores.

    Attributes:
        position: ``[U, 2]`` float32.
        health: ``[U]`` float32.
        cooldown: ``[U]`` float32, seconds until a unit can shoot again.
        movement: ``[U, 2]`` float32, the direction of its last step.
        attack: ``[U]`` uint8, its last attack action, 0 for none.
        kind: ``[U]`` uint8, its type.
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
    """One of SMAC's battles, fought by allies that learn against JaxMARL's heuristic enemy.

    Attributes:
        map: SMAC's name of the battle; ``corridor`` has SMAC's units but not its choke point.
        episode_limit: steps.
        max_return: what a won battle is worth in all: 2 as SMAX has it, 20 as SMAC's rewards are scaled.
        see_enemy_actions: whether an observation shows what enemies in sight did last.
        walls_cause_death: whether a unit that touches the edge of the map dies.
        attack_mode: which of the enemies in range the heuristic shoots at.
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
        """Both armies on their sides of the map, with noise on their positions."""
        with jax.numpy_rank_promotion("allow"):
            return without_weak_types(self.game.reset(key)[1])

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """JaxMARL's ``step_env``, which unlike its ``step`` never resets."""
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
        """Each ally's list of the units in its sight, and all units as the state."""
        return self.decompress(self.compress(env_state))

    def metrics(self, env_state: EnvState) -> dict[str, Array]:
        """Whether the battle was won (all enemies dead and an ally alive), and how many died."""
        allies, enemies = self._alive(env_state)
        return {
            "win_rate": (allies.any() & ~enemies.any()).astype(jnp.float32),
            "dead_allies": (~allies).sum().astype(jnp.float32),
            "dead_enemies": (~enemies).sum().astype(jnp.float32),
        }

    @property
    def external(self) -> External:
        """JaxMARL's version, which the rules of the battles depend on."""
        return ExternalPackage("jaxmarl")

    def compress(self, env_state: EnvState) -> Units:
        """The units: far less than what each ally sees of them."""
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
        """JaxMARL's features of the units, for all at once: on a CPU twice as fast as its own, pair by pair."""
        game, units = self.game, compressed
        distance = jnp.linalg.norm(_offsets(game, units), axis=-1)
        kind, alive = units.kind.astype(jnp.int32), units.alive[: game.num_allies, None]
        in_range = distance < game.unit_type_attack_ranges[kind][: game.num_allies, None]
        can_attack = (alive & units.alive[None] & in_range)[:, game.num_allies :]
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
    """From each ally to each unit, ``[N, U, 2]``."""
    return units.position[None] - units.position[: game.num_allies, None]


def _features_in_sight(game: Any, units: Units, distance: Array, *, see_enemy_actions: bool) -> Array:
    """What each ally sees of the others, in their order, and of itself: ``[N, obs_dim]``."""
    num_allies, num_units = game.num_allies, len(units.kind)
    kind, is_ally = units.kind.astype(jnp.int32), np.arange(num_units) < num_allies
    sight = game.unit_type_sight_ranges[kind][:num_allies, None]
    last_attack = np.where(is_ally, game.num_ally_actions - 1, game.num_enemy_actions - 1)
    actions = jnp.concatenate([units.movement, (units.attack / last_attack)[:, None]], axis=1)
    told = jnp.concatenate(
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
            jnp.broadcast_to(told[None], (num_allies, *told.shape)),
        ],
        axis=2,
    )
    visible = (distance < sight) & units.alive[:num_allies, None] & units.alive[None]
    features = jnp.where(visible[..., None], features, 0.0)
    before_itself = (np.arange(num_units - 1)[None] < np.arange(num_allies)[:, None])[..., None]
    others = jnp.where(before_itself, features[:, :-1], features[:, 1:])
    map_size = np.array([game.map_width, game.map_height], np.float32)
    itself = _own_features(game, units, units.position / map_size[None], _loaded(game, units))
    return jnp.concatenate([others.reshape(num_allies, -1), itself[:num_allies]], axis=1)


def _own_features(game: Any, units: Units, position: Array, cooldown: Array) -> Array:
    """Health, position, cooldown and type of each unit, zero for the dead: ``[U, 4 + types]``."""
    kinds = jax.nn.one_hot(units.kind.astype(jnp.int32), len(game.unit_type_names))
    features = jnp.concatenate([_health_share(game, units)[:, None], position, cooldown[:, None], kinds], axis=1)
    return jnp.where(units.alive[:, None], features, 0.0)


def _health_share(game: Any, units: Units) -> Array:
    return units.health / game.unit_type_health[units.kind.astype(jnp.int32)]


def _loaded(game: Any, units: Units) -> Array:
    """The share of a weapon's cooldown that is still to come, ``[U]``."""
    return jnp.clip(units.cooldown / game.unit_type_weapon_cooldowns[units.kind.astype(jnp.int32)], 0.0, 1.0)


def map_names() -> list[str]:
    """SMAC's battles that are here."""
    return [*_library().MAP_NAME_TO_SCENARIO, "corridor"]


@functools.cache
def _library() -> Any:
    """JaxMARL's module of the game, imported in silence; its maps are arrays, which a trace must not make."""
    with _silence(), jax.ensure_compile_time_eval():
        from jaxmarl.environments.smax import smax_env
    return smax_env


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """JaxMARL prints what it has not found, and one of its modules puts the original streams in the place of others."""
    kept = sys.stdout, sys.stderr, sys.__stdout__
    sys.stdout = sys.__stdout__ = io.StringIO()  # type: ignore[misc]
    try:
        yield
    finally:
        sys.stdout, sys.stderr, sys.__stdout__ = kept  # type: ignore[misc]


@functools.cache
def _game(name: str, max_steps: int, see_enemy_actions: bool, walls_cause_death: bool, attack_mode: str) -> Any:
    """One object per set of options: JaxMARL's jitted methods are cached by it.

    It holds arrays and outlives the caller, so its arrays are concrete even where a function is being traced.
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
    library = _library()
    if name != "corridor":
        return library.MAP_NAME_TO_SCENARIO[name]
    kinds = jnp.array([ZEALOT] * 6 + [ZERGLING] * 24, jnp.uint8)
    return library.Scenario(kinds, 6, 24, smacv2_position_generation=False, smacv2_unit_type_generation=False)
