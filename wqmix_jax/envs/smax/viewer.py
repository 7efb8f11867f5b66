"""Draws battles of SMAX with matplotlib."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from wqmix_jax.envs.base import EnvState
from wqmix_jax.envs.smax.task import SMAX
from wqmix_jax.envs.viewer import StateViewer
from wqmix_jax.types import Moment

# Two of Okabe and Ito's colours, which can be distinguished with any colour vision; each team also has its shape.
_COLOURS = {"ally": "#0072B2", "enemy": "#D55E00"}
_MARKERS = {"ally": "o", "enemy": "s"}
_TEAMS = ("allies", "enemies")
_SQUARE_SHARE = 0.86  # a square's width over a disc's, for about the same area: bodies touch, but do not overlap
_FIGURE_SIZE = (8.0, 6.0)  # inches
_VIEW_SIZE = np.array([18.0, 12.0])  # the smallest part of the map that is shown, in the proportions of the axes
_MARGIN = 1.5  # in the map's units of length, around all units


class Unit(NamedTuple):
    """One unit as it is drawn.

    Attributes:
        team: ``ally`` or ``enemy``.
        kind: SMAX's name of its type.
        letter: SMAX's shorthand for the type.
        position: ``[2]``, on the map.
        radius: in the map's units of length.
        health: the share that is left, 0 when dead.
        target: the index of the unit that it attacked in its last step; None if it attacked none or is dead.
    """

    team: str
    kind: str
    letter: str
    position: NDArray
    radius: float
    health: float
    target: int | None


class SMAXViewer(StateViewer[EnvState]):
    """Draws allies as discs and enemies as squares, filled up to their health, with arrows to the units they attacked.

    States are those of `SMAX.reset` and `SMAX.step`, unbatched.
    """

    def __init__(self, env: SMAX, name: str = "SMAX", render_mode: str = "rgb_array") -> None:
        """Sets the figure up.

        Args:
            env: the environment of the states.
            name: the figure's name.
            render_mode: ``rgb_array`` to return arrays, ``human`` to show a window.
        """
        self._env = env
        super().__init__(name, render_mode, _FIGURE_SIZE)

    def render(self, state: EnvState, save_path: str | None = None) -> NDArray | None:
        """Draws one state; see `StateViewer.render`."""
        self._look_at([state])
        return super().render(state, save_path)

    def animate(self, states: Sequence[EnvState], interval: int = 200, save_path: str | None = None) -> FuncAnimation:
        """Draws one frame per state, all of the same part of the map; see `StateViewer.animate`."""
        self._look_at(states)
        return super().animate(states, interval, save_path)

    def film(self, moments: Sequence[Moment], save_path: str, interval: int = 250) -> None:
        """Draws an episode, all of it on the same part of the map; see `StateViewer.film`."""
        self._look_at([moment.env_state for moment in moments])
        super().film(moments, save_path, interval)

    def units(self, env_state: EnvState) -> list[Unit]:
        """Returns all units, allies first."""
        game, state = self._env.game, env_state.state
        kinds, targets = np.asarray(state.unit_types), self._targets(env_state)
        full = np.asarray(game.unit_type_health)[kinds]
        radius = np.asarray(game.unit_type_radiuses)[kinds]
        positions = np.asarray(state.unit_positions)
        health = np.where(np.asarray(state.unit_alive), np.asarray(state.unit_health) / full, 0.0)
        return [
            Unit(
                team="ally" if index < game.num_allies else "enemy",
                kind=game.unit_type_names[kind],
                letter=game.unit_type_shorthands[kind],
                position=positions[index],
                radius=float(radius[index]),
                health=float(health[index]),
                target=targets[index],
            )
            for index, kind in enumerate(kinds)
        ]

    def _targets(self, env_state: EnvState) -> list[int | None]:
        """Returns the index of the unit that each unit attacked, None for none.

        In SMAX's actions, allies count the enemies from the first, and enemies count the allies from the last.
        """
        game, state = self._env.game, env_state.state
        orders = np.asarray(state.prev_attack_actions) - game.num_movement_actions
        is_ally = np.arange(len(orders)) < game.num_allies
        targets = np.where(is_ally, game.num_allies + orders, game.num_allies - 1 - orders)
        attacks = (orders >= 0) & np.asarray(state.unit_alive)
        return [int(target) if attack else None for target, attack in zip(targets, attacks, strict=True)]

    def _look_at(self, states: Sequence[EnvState]) -> None:
        """Chooses the part of the map that holds all units of ``states``."""
        positions = np.concatenate([np.asarray(state.state.unit_positions) for state in states])
        low, high = positions.min(0) - _MARGIN, positions.max(0) + _MARGIN
        size = _VIEW_SIZE * max(1.0, ((high - low) / _VIEW_SIZE).max())
        self._low, self._high = (low + high - size) / 2, (low + high + size) / 2
        self._points = _FIGURE_SIZE[0] * 72 * 0.93 / size[0]  # typographic points in one unit of length of the map

    def _draw(self, ax: Axes, state: EnvState) -> None:
        units = self.units(state)
        (left, bottom), (right, top) = self._low, self._high
        ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[], facecolor="0.88")
        ax.add_patch(
            Rectangle((0, 0), self._env.game.map_width, self._env.game.map_height, facecolor="white", zorder=0)
        )
        for unit in units:
            self._draw_unit(ax, unit)
            if unit.target is not None:
                self._draw_attack(ax, unit, units[unit.target])
        ax.set_title(self._title(state, units), fontsize=11)
        ax.set_xlabel("   ".join(sorted({f"{unit.letter}: {unit.kind}" for unit in units})), fontsize=10)
        self._draw_legend(ax)

    def _draw_unit(self, ax: Axes, unit: Unit) -> None:
        """Draws the body, filled from below up to the share of health that is left."""
        colour, (x, y), radius = _COLOURS[unit.team], unit.position, unit.radius
        size = 2 * radius * self._points
        if not unit.health:
            ax.plot(x, y, "x", color=colour, markersize=size / 2, markeredgewidth=2, alpha=0.4, zorder=1)
            return
        half = radius if unit.team == "ally" else radius * _SQUARE_SHARE
        corner, side = (x - half, y - half), 2 * half
        body = Circle((x, y), half) if unit.team == "ally" else Rectangle(corner, side, side)
        body.set(facecolor="white", edgecolor=colour, linewidth=1.5, zorder=3)
        ax.add_patch(body)
        filled = Rectangle(corner, side, side * unit.health, facecolor=colour, zorder=4)
        ax.add_patch(filled)
        filled.set_clip_path(body)
        text = ax.text(x, y, unit.letter, color="white", fontsize=size / 2, ha="center", va="center_baseline", zorder=5)
        text.set(clip_on=True, path_effects=[withStroke(linewidth=2, foreground=colour)])

    def _draw_attack(self, ax: Axes, attacker: Unit, target: Unit) -> None:
        style = {"arrowstyle": "-|>", "color": _COLOURS[attacker.team], "linewidth": 1.5}
        style |= {"connectionstyle": "arc3,rad=0.1"}  # curved, so that two units that attack each other get two arrows
        style |= {"shrinkA": attacker.radius * self._points * 0.7, "shrinkB": target.radius * self._points * 0.7}
        ax.annotate("", tuple(target.position), tuple(attacker.position), arrowprops=style, zorder=6)

    def _title(self, env_state: EnvState, units: Sequence[Unit]) -> str:
        """Returns the step and the living units, and once the battle is over its result."""
        teams = {team: [unit.health > 0 for unit in units if unit.team == team] for team in _COLOURS}
        allies, enemies, step = any(teams["ally"]), any(teams["enemy"]), int(env_state.state.step)
        parts = [self._env.map, f"step {step} of {self._env.episode_limit}"]
        parts += [f"{name} {sum(alive)} of {len(alive)}" for name, alive in zip(_TEAMS, teams.values(), strict=True)]
        if not (allies and enemies):
            parts.append("won" if allies else "lost" if enemies else "draw")
        elif step >= self._env.episode_limit:
            parts.append("time is up")
        return "   ".join(parts)

    def _draw_legend(self, ax: Axes) -> None:
        def entry(label: str, marker: str, color: str, **style: Any) -> Line2D:
            return Line2D([], [], linestyle="none", markersize=11, label=label, marker=marker, color=color, **style)

        handles = [
            *(entry(team, _MARKERS[team], colour) for team, colour in _COLOURS.items()),
            entry("half of its health", "o", _COLOURS["ally"], fillstyle="bottom", markerfacecoloralt="white"),
            entry("attack", r"$\rightarrow$", "0.4"),
            entry("dead", "x", "0.6", markeredgewidth=2),
        ]
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(handles), frameon=False)
