"""SMAC, SMACv2 and SMAClite as environments; ``adapters.py`` is their part in the workers."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from wqmix_jax.envs.host.bridge import BridgedEnvironment
from wqmix_jax.options import PositiveInt, options

Difficulty = Literal["1", "2", "3", "4", "5", "6", "7", "8", "9", "A"]


@options
class SMAC(BridgedEnvironment):
    """The StarCraft Multi-Agent Challenge (Samvelyan et al. 2019), in StarCraft II.

    Attributes:
        map: the battle.
        difficulty: the level of the game's built-in AI.
        game_version: the ``game_version`` of ``StarCraft2Env``; the newest installed one when absent.
        continuing_episode: whether an episode at the time limit counts as truncated; otherwise it counts as terminated.
        options: further arguments of ``StarCraft2Env``.
    """

    map: str
    difficulty: Difficulty
    game_version: str | None
    continuing_episode: bool
    options: dict[str, Any]

    @property
    def played(self) -> tuple[str, dict[str, Any]]:
        """See `BridgedEnvironment.played`."""
        return _adapter("SMAC"), self._options(self.options)

    @pydantic.field_validator("difficulty", mode="before")
    @classmethod
    def _digit(cls, difficulty: Any) -> Any:
        """Accepts the number 7 for ``7``: the command line reads it so."""
        return str(difficulty) if type(difficulty) is int else difficulty

    @pydantic.field_validator("game_version", mode="before")
    @classmethod
    def _three_parts(cls, game_version: Any) -> Any:
        """Refuses a version that was read as a number, where 4.10 became 4.1."""
        if isinstance(game_version, int | float):
            raise ValueError("a number is no version: write all three parts, as in 4.10.0")
        return game_version

    def _options(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Returns all arguments of ``StarCraft2Env`` except its seed."""
        named = {
            "map_name": self.map,
            "difficulty": self.difficulty,
            "game_version": self.game_version,
            "continuing_episode": self.continuing_episode,
        }
        return _joined(named, extra)


@options
class SMACv2(SMAC):
    """SMACv2 (Ellis et al. 2023): SMAC with teams and start positions drawn for every battle.

    Attributes:
        num_units: number of allies.
        num_enemies: number of enemies.
        unit_types: the types that teams are drawn from.
        unit_weights: the probability of each type.
        exception_unit_types: types of which no team may consist exclusively.
        surrounded: the probability that the allies begin in the middle of the enemies.
    """

    num_units: PositiveInt
    num_enemies: PositiveInt
    unit_types: list[str]
    unit_weights: list[Annotated[float, Field(ge=0, le=1, strict=False)]]
    exception_unit_types: list[str]
    surrounded: Annotated[float, Field(ge=0, le=1, strict=False)]

    @property
    def played(self) -> tuple[str, dict[str, Any]]:
        """See `BridgedEnvironment.played`."""
        team = {
            "dist_type": "weighted_teams",
            "unit_types": self.unit_types,
            "weights": self.unit_weights,
            "exception_unit_types": self.exception_unit_types,
            "observe": True,
        }
        # SMACv2 surrounds where its draw exceeds p.
        positions = {"dist_type": "surrounded_and_reflect", "p": 1 - self.surrounded, "map_x": 32, "map_y": 32}
        counts = {"n_units": self.num_units, "n_enemies": self.num_enemies}
        drawn = {"capability_config": {**counts, "team_gen": team, "start_positions": positions}}
        return _adapter("SMACv2"), self._options({**drawn, **self.options})


@options
class SMAClite(BridgedEnvironment):
    """SMAClite (Michalski et al. 2023): SMAC's battles in Python, without StarCraft II.

    Attributes:
        map: the battle.
        episode_limit: steps.
        options: further arguments of ``SMACliteEnv``.
    """

    map: str
    episode_limit: PositiveInt
    options: dict[str, Any]

    @property
    def played(self) -> tuple[str, dict[str, Any]]:
        """See `BridgedEnvironment.played`."""
        return _adapter("SMAClite"), _joined({"map_name": self.map, "episode_limit": self.episode_limit}, self.options)


def _adapter(name: str) -> str:
    return f"{Path(__file__).with_name('adapters.py')}:{name}"


def _joined(named: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Joins named and further arguments; refuses further ones that repeat a named one."""
    taken = sorted((named.keys() | {"seed"}) & extra.keys())
    if taken:
        raise ValueError(f"options={{{taken[0]}: ..}} is not allowed: it has its own key")
    return {**named, **extra}
