"""Draws the ring of `meet.Meet` as a row of cells."""

from matplotlib.axes import Axes
from meet import Meet, State

from wqmix_jax.envs.viewer import StateViewer


class MeetViewer(StateViewer[State]):
    """Agents as numbered discs, one row for each."""

    def __init__(self, env: Meet) -> None:
        """Sets the figure up."""
        super().__init__("Meet", "rgb_array", figure_size=(6.0, 3.0))
        self._env = env

    def _draw(self, ax: Axes, state: State) -> None:
        for agent, cell in enumerate(state.cells.tolist()):
            ax.plot(cell, agent, "o", markersize=24)
            ax.text(cell, agent, str(agent), color="white", ha="center", va="center")
        ax.set_xlim(-0.5, self._env.num_cells - 0.5)
        ax.set_ylim(-0.5, self._env.num_agents - 0.5)
        ax.set_xticks(range(self._env.num_cells))
        ax.set_yticks([])
        ax.set_title(f"step {int(state.steps)}")
