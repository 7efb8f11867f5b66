"""What the viewers share: pictures and animations of an environment's states, drawn with matplotlib."""

import abc
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import matplotlib.pyplot as plt
from jumanji.viewer import MatplotlibViewer
from matplotlib.animation import FuncAnimation
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from numpy.typing import NDArray

StateT = TypeVar("StateT")


class StateViewer(MatplotlibViewer, abc.ABC, Generic[StateT]):
    """Draws states one by one or as an animation; a subclass says how one state lies on the axes."""

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
            save_path: where the animation goes, a GIF or what else matplotlib can write.
        """
        fig, ax = self._get_fig_ax(name_suffix="_animation", show=False)
        plt.close(fig)

        def draw_frame(state: StateT) -> Sequence[Artist]:
            ax.clear()
            self._draw(ax, state)
            return (ax,)

        animation = FuncAnimation(fig, draw_frame, frames=states, interval=interval)
        self._animation = animation
        if save_path:
            animation.save(save_path, writer="pillow" if save_path.endswith(".gif") else None)
        return animation
