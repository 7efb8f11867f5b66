"""SMAC, SMACv2 and SMAClite as environments; the workers' side of them is ``adapters.py``."""

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
        difficulty: of the game's own AI.
        game_version: as ``StarCraft2Env`` takes it; the newest that is installed when absent.
        continuing_episode: whether an episode at the time limit was only cut; otherwise it counts as terminated.
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
        """The command line reads ``7`` as a number."""
        return str(difficulty) if type(difficulty) is int else difficulty

    @pydantic.field_validator("game_version", mode="before")
    @classmethod
    def _three_parts(cls, game_version: Any) -> Any:
        """Refuses a version that was read as a number: 4.10 became 4.1."""
        if isinstance(game_version, int | float):
            raise ValueError("a number is no version: write all three parts, as in 4.10.0")
        return game_version

    def _options(self, extra: dict[str, Any]) -> dict[str, Any]:
        """All arguments of ``StarCraft2Env`` but its seed."""
        named = {
            "map_name": self.map,
            "difficulty": self.difficulty,
            "game_version": self.game_version,
            "continuing_episode": self.continuing_episode,
        }
        return _joined(named, extra)


@options
class SMACv2(SMAC):
    """SMACv2 (Ellis et al. 2023): SMAC with teams and start positions drawn anew in every battle.

    Attributes:
        num_units: allies.
        num_enemies: enemies.
        unit_types: what teams consist of.
        unit_weights: how likely each of them is.
        exception_unit_types: of which no team may consist alone.
        surrounded: how likely the allies begin in the middle of the enemies.
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
    """Refuses an option that has a key of its own."""
    taken = sorted((named.keys() | {"seed"}) & extra.keys())
    if taken:
        raise ValueError(f"options={{{taken[0]}: ..}} is not allowed: it has a key of its own")
    return {**named, **extra}
