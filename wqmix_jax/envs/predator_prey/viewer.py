"""Draws predator-prey states with matplotlib."""

from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from wqmix_jax.envs.predator_prey.task import EnvState, PredatorPrey
from wqmix_jax.envs.viewer import StateViewer
from wqmix_jax.types import Moment

# Okabe and Ito's colours, which can be distinguished with any colour vision; each kind also has a different shape.
_STYLES: dict[str, dict[str, Any]] = {
    "agent": {"marker": "o", "markerfacecolor": "#0072B2", "markeredgecolor": "#0072B2"},
    "frozen agent": {"marker": "o", "markerfacecolor": "white", "markeredgecolor": "#0072B2"},
    "stag": {"marker": "s", "markerfacecolor": "#E69F00", "markeredgecolor": "#E69F00"},
    "hare": {"marker": "^", "markerfacecolor": "#009E73", "markeredgecolor": "#009E73"},
}
# The result of a step for a prey, drawn on the cell where the prey was; shape and sign repeat what the colour says.
_EVENTS: dict[str, dict[str, Any]] = {
    "capture": {"marker": "*", "markerfacecolor": "#F0E442", "markeredgecolor": "black"},
    "miscapture": {"marker": "X", "markerfacecolor": "#D55E00", "markeredgecolor": "black"},
}
_FIGURE_SIZE = 6.0  # inches, along the grid's longer side
_MARKER_SHARE = 0.62  # of a cell's side


class Drawable(Protocol):
    """A `Moment`, or a state of jumanji's interface (`wqmix_jax.envs.predator_prey.jumanji.State`)."""

    @property
    def env_state(self) -> EnvState: ...  # noqa: D102


class PredatorPreyViewer(StateViewer[Drawable]):
    """Agents as numbered discs (hollow once frozen), stags as squares and hares as triangles.

    A film shows captures (a star) and miscaptures (a cross) with their rewards on the cells where the prey was, and
    agents that have left the grid as faint rings on the cells that they left.
    """

    def __init__(self, task: PredatorPrey, name: str = "PredatorPrey", render_mode: str = "rgb_array") -> None:
        """Sets the figure up.

        Args:
            task: whose states are drawn.
            name: the figure's name.
            render_mode: ``rgb_array`` to return arrays, ``human`` to show a window.
        """
        rows, columns = task.world_shape
        self._task, self._miscaptures = task, jax.jit(task.miscaptures)
        self._cell_inches = _FIGURE_SIZE / max(rows, columns)
        size = (max(columns * self._cell_inches, 4.5) + 0.6, rows * self._cell_inches + 1.2)
        super().__init__(name, render_mode, size)

    def _draw(self, ax: Axes, state: Drawable) -> None:
        env_state = state.env_state
        self._draw_grid(ax)
        for kind, label, (row, column) in self._entities(env_state):
            size = self._cell_inches * 72 * _MARKER_SHARE
            ax.plot(column, row, **_STYLES[kind], markersize=size, markeredgewidth=size / 12, linestyle="none")
            color = "#0072B2" if kind == "frozen agent" else "black" if kind == "stag" else "white"
            ax.text(column, row, label, color=color, fontsize=size * 0.45, ha="center", va="center_baseline")
        frozen = int((~np.asarray(env_state.agents_active)).sum())
        caught = int((~np.asarray(env_state.prey_alive)).sum())
        ax.set_title(
            f"step {int(env_state.steps)} of {self._task.episode_limit}   "
            f"caught {caught} of {self._task.num_prey}   frozen {frozen} of {self._task.num_agents}",
            fontsize=11,
        )

    def _draw_moment(self, ax: Axes, moment: Moment) -> None:
        self._draw(ax, moment)
        size = self._cell_inches * 72
        if self._task.remove_frozen:
            gone = ~np.asarray(moment.env_state.agents_active)
            for position in np.asarray(moment.env_state.agents_pos)[gone]:
                ring = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "#0072B2", "alpha": 0.35}
                ax.plot(*position[::-1], **ring, markersize=size * _MARKER_SHARE, linestyle=":", zorder=1)
        for kind, reward, (row, column) in self._events(moment):
            ax.plot(column, row, **_EVENTS[kind], markersize=size * 0.55, linestyle="none", zorder=4)
            sign = {"color": "black", "fontsize": size * 0.24, "ha": "center", "va": "bottom", "weight": "bold"}
            outline = [withStroke(linewidth=2.5, foreground="white")]
            ax.text(column, row - 0.3, f"{reward:+g}", **sign, path_effects=outline, zorder=5)
        self._draw_event_legend(ax)

    def _draw_event_legend(self, ax: Axes) -> None:
        """Adds a second row to the legend, below the kinds of entities."""
        shown: dict[str, dict[str, Any]] = dict(_EVENTS)
        if self._task.remove_frozen:
            shown["frozen, off the grid"] = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "#99C7E0"}
        handles = [
            Line2D([], [], **style, markersize=10, linestyle="none", label=kind) for kind, style in shown.items()
        ]
        first = ax.get_legend()
        box = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.06), "frameon": False}
        ax.legend(handles=handles, ncols=len(handles), **box)
        if first is not None:
            ax.add_artist(first)

    def _events(self, moment: Moment) -> Iterator[tuple[str, float, NDArray]]:
        """Yields kind, reward and position for each prey that was caught, or missed, in the step."""
        before = moment.before
        if before is None:
            return
        task = self._task
        caught = np.asarray(before.prey_alive) & ~np.asarray(moment.env_state.prey_alive)
        missed = np.asarray(self._miscaptures(before, moment.joint_action, moment.key))
        for index, position in enumerate(np.asarray(before.prey_pos)):
            if caught[index]:
                yield "capture", task.reward_stag if index < task.num_stags else task.reward_hare, position
            elif missed[index]:
                yield "miscapture", task.punishment, position

    def _draw_grid(self, ax: Axes) -> None:
        rows, columns = self._task.world_shape
        ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])
        ax.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="0.85", linewidth=0.8, zorder=0)
        ax.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="0.85", linewidth=0.8, zorder=0)
        shown = {"agent": True, "frozen agent": not self._task.remove_frozen}
        shown |= {"stag": self._task.num_stags > 0, "hare": self._task.num_hares > 0}
        handles = [
            Line2D([], [], **style, markersize=10, linestyle="none", label=kind)
            for kind, style in _STYLES.items()
            if shown[kind]
        ]
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=len(handles), frameon=False)

    def _entities(self, env_state: EnvState) -> Iterator[tuple[str, str, NDArray]]:
        """Yields kind, label and position of every agent and prey on the grid."""
        agents_pos, prey_pos, prey_alive, agents_active, _ = map(np.asarray, env_state)
        for index, (position, active) in enumerate(zip(agents_pos, agents_active, strict=True)):
            if active or not self._task.remove_frozen:
                yield "agent" if active else "frozen agent", str(index), position
        for index, (position, alive) in enumerate(zip(prey_pos, prey_alive, strict=True)):
            if alive:
                yield ("stag", "S", position) if index < self._task.num_stags else ("hare", "H", position)
