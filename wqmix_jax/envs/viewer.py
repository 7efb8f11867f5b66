"""Pictures and animations of an environment's states, drawn with matplotlib: the part that all viewers share."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import matplotlib.pyplot as plt
from jumanji.viewer import MatplotlibViewer
from matplotlib.animation import FuncAnimation
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from numpy.typing import NDArray

from wqmix_jax.types import Moment

StateT = TypeVar("StateT")

_LAST_FRAMES = 8
"""The number of frames that show a film's last picture, so that its end can be seen."""

_LAYOUT_PASSES = 5
"""Drawings after which the layout no longer changes: each makes a bit more room for the legend."""


class StateViewer(MatplotlibViewer, abc.ABC, Generic[StateT]):
    """Draws states one by one or as an animation; a subclass draws one state on the axes."""

    def __init__(self, name: str, render_mode: str, figure_size: tuple[float, float]) -> None:
        """Sets the figure up.

        Args:
            name: the figure's name.
            render_mode: ``rgb_array`` to return arrays, ``human`` to show a window.
            figure_size: width and height in inches.
        """
        self._shows = render_mode == "human"
        super().__init__(name, render_mode, figure_size)

    @abc.abstractmethod
    def _draw(self, ax: Axes, state: StateT) -> None:
        """Draws ``state`` on cleared axes."""

    def _draw_moment(self, ax: Axes, moment: Moment) -> None:
        """Draws a moment on cleared axes; by default its state alone. A subclass may add what happened in the step."""
        self._draw(ax, moment.env_state)

    def render(self, state: StateT, save_path: str | None = None) -> NDArray | None:
        """Draws one state; see `MatplotlibViewer.render`."""
        self._clear_display()
        fig, ax = self._get_fig_ax(show=self._shows)
        ax.clear()
        self._draw(ax, state)
        if save_path:
            fig.savefig(save_path)
        shown: Any = self._display(fig)
        return None if shown is None else shown.copy()  # the figure's own buffer is drawn over by the next state

    def animate(self, states: Sequence[StateT], interval: int = 200, save_path: str | None = None) -> FuncAnimation:
        """Draws one frame per state; see `MatplotlibViewer.animate`.

        Args:
            states: of consecutive steps.
            interval: milliseconds between frames.
            save_path: the file that is written, a GIF or another format of matplotlib's.
        """
        return self._animated(self._draw, states, interval, save_path)

    def film(self, moments: Sequence[Moment], save_path: str, interval: int = 250) -> None:
        """Draws one frame per moment of an episode, with the return so far in its title.

        Args:
            moments: consecutive, from `wqmix_jax.runs.saved_policies.play_episode`.
            save_path: the file that is written, a GIF or another format of matplotlib's.
            interval: milliseconds between frames.
        """

        def draw(ax: Axes, moment: Moment) -> None:
            self._draw_moment(ax, moment)
            ax.set_title(f"{ax.get_title()}   return {moment.episode_return:.4g}", fontsize=11)

        self._animated(draw, [*moments, *[moments[-1]] * (_LAST_FRAMES - 1)], interval, save_path)

    def _animated(
        self, draw: Callable[[Axes, Any], None], frames: Sequence[Any], interval: int, save_path: str | None
    ) -> FuncAnimation:
        fig, ax = self._get_fig_ax(name_suffix="_animation", show=False)
        plt.close(fig)

        def draw_frame(frame: Any) -> Sequence[Artist]:
            ax.clear()
            draw(ax, frame)
            return (ax,)

        draw_frame(frames[0])
        # The layout is settled on the first frame and then fixed: otherwise the axes would move during the animation.
        for _ in range(_LAYOUT_PASSES):
            fig.draw_without_rendering()
        fig.set_layout_engine("none")
        animation = FuncAnimation(fig, draw_frame, frames=frames, interval=interval)
        self._animation = animation
        if save_path:
            animation.save(save_path, writer="pillow" if save_path.endswith(".gif") else None)
        return animation
