"""Pictures of battles: positions, health and attacks of the units."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from wqmix_jax.config import load_group
from wqmix_jax.envs.smax import SMAX
from wqmix_jax.envs.smax.viewer import SMAXViewer
from wqmix_jax.options import build
from wqmix_jax.types import Moment

ALLY, ENEMY = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


@pytest.fixture(scope="module")
def env() -> SMAX:
    return build("env", load_group("env", "smax") | {"map": "2s3z"})


@pytest.fixture(scope="module")
def start(env: SMAX) -> Any:
    """Returns two columns face to face, so near that every unit can attack."""
    state = env.reset(jax.random.key(0))
    positions = [[x, y] for x in (15.5, 16.5) for y in (10.0, 13.0, 16.0, 19.0, 22.0)]
    return changed(state, unit_positions=jnp.array(positions, jnp.float32))


@pytest.fixture(scope="module")
def fought(env: SMAX, start: Any) -> Any:
    """Returns the state after a step in which each ally attacked the enemy opposite."""
    return jax.jit(env.step)(start, jnp.arange(5, 10, dtype=jnp.int32), jax.random.key(1))[0]


def changed(state: Any, **leaves: Any) -> Any:
    return state.replace(state=state.state.replace(**leaves))


def pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture[..., :3] == colour).all(-1).sum())


def test_units_have_their_side_type_and_health(env: SMAX, start: Any) -> None:
    units = SMAXViewer(env).units(changed(start, unit_health=start.state.unit_health.at[7].set(75.0)))
    assert [unit.team for unit in units] == ["ally"] * 5 + ["enemy"] * 5
    assert [unit.kind for unit in units] == ["stalker", "stalker", "zealot", "zealot", "zealot"] * 2
    assert [unit.letter for unit in units] == ["s", "s", "Z", "Z", "Z"] * 2
    assert [unit.health for unit in units] == [1.0] * 7 + [0.5] + [1.0] * 2
    assert units[6].position.tolist() == [16.5, 13.0]
    assert all(unit.target is None for unit in units)


def test_a_target_is_whom_the_game_hurts(env: SMAX, start: Any, fought: Any) -> None:
    targets = [unit.target for unit in SMAXViewer(env).units(fought)]
    assert targets == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    hurt = {index for index, unit in enumerate(SMAXViewer(env).units(fought)) if unit.health < 1}
    assert hurt == set(targets)
    # One alone attacks, and not its opposite: ally 0 the last enemy, enemy 5 in its turn.
    crossed = changed(start, prev_attack_actions=jnp.zeros(10, jnp.int32).at[0].set(9).at[5].set(8))
    assert [unit.target for unit in SMAXViewer(env).units(crossed)] == [9, *[None] * 4, 1, *[None] * 4]


def test_the_dead_neither_fight_nor_have_health(env: SMAX, fought: Any) -> None:
    dead = SMAXViewer(env).units(changed(fought, unit_alive=fought.state.unit_alive.at[5].set(False)))[5]
    assert (dead.health, dead.target) == (0.0, None)


def test_a_picture_fills_bodies_up_to_their_health(env: SMAX, start: Any) -> None:
    viewer = SMAXViewer(env)
    full = np.asarray(viewer.render(start))
    half = np.asarray(viewer.render(changed(start, unit_health=start.state.unit_health / 2)))
    none = np.asarray(viewer.render(changed(start, unit_alive=jnp.zeros(10, bool))))
    viewer.close()
    assert full.dtype == np.uint8
    for colour in (ALLY, ENEMY):
        assert pixels(full, colour) > 1.3 * pixels(half, colour) > 1.3 * pixels(none, colour) > 0


@pytest.mark.parametrize(
    ("dead", "step", "title"),
    [
        ([], 7, "allies 5 of 5   enemies 5 of 5"),
        ([5, 6, 7, 8, 9], 7, "allies 5 of 5   enemies 0 of 5   won"),
        ([0, 1, 2, 3, 4, 6], 7, "allies 0 of 5   enemies 4 of 5   lost"),
        (list(range(10)), 7, "allies 0 of 5   enemies 0 of 5   draw"),
        ([9], 100, "allies 5 of 5   enemies 4 of 5   time is up"),
    ],
)
def test_the_title_names_the_state_of_the_battle(env: SMAX, start: Any, dead: list[int], step: int, title: str) -> None:
    viewer = SMAXViewer(env)
    state = changed(start, step=jnp.int32(step), unit_alive=jnp.array([index not in dead for index in range(10)]))
    assert viewer._title(state, viewer.units(state)) == f"2s3z   step {step} of 100   {title}"


def test_an_animation_is_saved_and_its_view_stays(env: SMAX, start: Any, fought: Any, tmp_path: Path) -> None:
    viewer = SMAXViewer(env)
    far = changed(fought, unit_positions=fought.state.unit_positions.at[0].set(jnp.array([2.0, 30.0])))
    viewer.animate([start, far, fought], interval=50, save_path=str(tmp_path / "battle.gif"))
    viewer.close()
    with Image.open(tmp_path / "battle.gif") as saved:
        assert saved.n_frames == 3
    for position in (far.state.unit_positions[0], start.state.unit_positions[9]):
        assert (viewer._low < position).all()
        assert (position < viewer._high).all()


def test_a_film_shows_the_return_and_one_part_of_the_map(env: SMAX, start: Any, fought: Any, tmp_path: Path) -> None:
    titles: list[str] = []
    viewer = SMAXViewer(env)
    moments = [Moment(start, 0.0), Moment(fought, 0.25, start)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Axes,
            "set_title",
            lambda axes, text, real=Axes.set_title, **how: titles.append(text) or real(axes, text, **how),
        )
        viewer.film(moments, str(tmp_path / "battle.gif"))
    assert any(title.startswith("2s3z   step 1 of") and title.endswith("   return 0.25") for title in titles)
    with Image.open(tmp_path / "battle.gif") as film:
        assert film.n_frames >= 2
