import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from jumanji.testing.env_not_smoke import check_env_does_not_smoke, check_env_specs_does_not_smoke
from jumanji.types import StepType
from PIL import Image

import wqmix_jax.envs
from wqmix_jax.envs.predator_prey import CATCH, STAY
from wqmix_jax.envs.predator_prey.jumanji import PredatorPreyJumanji, State
from wqmix_jax.envs.predator_prey.viewer import PredatorPreyViewer
from wqmix_jax.errors import ConfigError
from wqmix_jax.types import Moment

SMALL = {"world_shape": [4, 5], "num_agents": 3, "num_stags": 2, "num_hares": 1, "obs_radius": 1}


@pytest.fixture(scope="module")
def env() -> PredatorPreyJumanji:
    return PredatorPreyJumanji(**SMALL, episode_limit=12)


@pytest.fixture(scope="module")
def step(env: PredatorPreyJumanji) -> Any:
    return jax.jit(env.step)


@pytest.fixture(scope="module")
def reset(env: PredatorPreyJumanji) -> Any:
    return jax.jit(env.reset)


@pytest.fixture(scope="module")
def state(reset: Any) -> State:
    return reset(jax.random.key(0))[0]


def changed(state: State, **changes: Any) -> State:
    return state.replace(env_state=state.env_state._replace(**changes))  # type: ignore[attr-defined]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_made_by_its_registered_name_with_the_papers_options() -> None:
    wqmix_jax.envs.register_jumanji()
    env = jumanji.make("PredatorPrey-v0")
    assert isinstance(env, PredatorPreyJumanji)
    assert (env.task.world_shape, env.task.num_agents, env.task.punishment) == ((10, 10), 8, -2)
    assert jumanji.make("PredatorPrey-v0", punishment=-1.5).task.punishment == -1.5
    with pytest.raises(ConfigError, match=r"env\.punishment=1 is not allowed"):
        jumanji.make("PredatorPrey-v0", punishment=1)


def test_registering_again_is_harmless() -> None:
    wqmix_jax.envs.register_jumanji()
    importlib.reload(wqmix_jax.envs)
    assert wqmix_jax.envs.JUMANJI_ID in jumanji.registered_environments()


def test_the_package_stays_light_until_it_is_asked_to_register() -> None:
    out = run(
        "import sys\n"
        "import wqmix_jax.envs, wqmix_jax.envs.predator_prey, wqmix_jax.envs.smax\n"
        "print([finder for finder in sys.meta_path if type(finder).__module__.startswith('wqmix_jax')])\n"
        "print('jumanji' in sys.modules, 'matplotlib' in sys.modules)\n"
        "wqmix_jax.envs.register_jumanji()\n"
        "import jumanji\n"
        "print('PredatorPrey-v0' in jumanji.registered_environments(), len(jumanji.registered_environments()) > 20)"
    )
    assert out.split() == ["[]", "False", "False", "True", "True"]


def test_it_registers_by_itself_where_jumanji_is_imported_already() -> None:
    out = run(
        "import jumanji, wqmix_jax.envs\n"
        "print('PredatorPrey-v0' in jumanji.registered_environments(), len(jumanji.registered_environments()) > 20)"
    )
    assert out.split() == ["True", "True"]


def test_jumanjis_own_checks() -> None:
    env = PredatorPreyJumanji(episode_limit=50)
    check_env_does_not_smoke(env)
    check_env_specs_does_not_smoke(env)


def test_specs_hold_what_is_returned(env: PredatorPreyJumanji, reset: Any, step: Any) -> None:
    state, timestep = reset(jax.random.PRNGKey(0))
    assert timestep.step_type == StepType.FIRST
    for _ in range(2):
        env.observation_spec.validate(timestep.observation)
        env.reward_spec.validate(timestep.reward)
        env.discount_spec.validate(timestep.discount)
        assert timestep.discount == 1
        assert state.key.dtype == jnp.uint32
        state, timestep = step(state, env.action_spec.generate_value())
    assert env.action_spec.num_values.tolist() == [6, 6, 6]


def test_it_plays_the_same_task(env: PredatorPreyJumanji, reset: Any, step: Any) -> None:
    state, timestep = reset(jax.random.key(7))

    @jax.jit
    def play(env_state: Any, joint_action: Any, key: Any) -> Any:
        after, outcome = env.task.step(env_state, joint_action, key)
        return after, outcome, env.task.observe(after), env.task.metrics(after)

    for actions in ([0, 1, 2], [5, 5, 5], [3, 2, 4]):
        step_key, _ = jax.random.split(jax.random.wrap_key_data(state.key))
        expected, outcome, seen, metrics = play(state.env_state, jnp.array(actions), step_key)
        state, timestep = step(state, jnp.array(actions))
        chex.assert_trees_all_equal(state.env_state, expected)
        np.testing.assert_array_equal(timestep.observation.agents_view, seen.obs)
        np.testing.assert_array_equal(timestep.observation.action_mask, seen.avail_actions)
        np.testing.assert_array_equal(timestep.observation.global_state, seen.state)
        assert timestep.observation.step_count == expected.steps
        assert timestep.reward == outcome.reward
        assert timestep.extras == metrics


def test_a_fresh_key_for_every_step(state: State, step: Any) -> None:
    keys = [state.key.tolist()]
    for _ in range(3):
        state, _ = step(state, jnp.full(3, STAY))
        keys.append(state.key.tolist())
    assert len({tuple(key) for key in keys}) == 4


@pytest.mark.parametrize(
    ("prey_alive", "steps", "step_type", "discount"),
    [
        ([True, True, True], 3, StepType.MID, 1),
        ([False, False, False], 3, StepType.LAST, 0),
        ([True, True, True], 11, StepType.LAST, 1),
        ([False, False, False], 11, StepType.LAST, 1),
    ],
    ids=["unfinished", "ended", "cut", "ended at the limit"],
)
def test_only_a_real_end_has_no_discount(
    state: State, step: Any, prey_alive: list[bool], steps: int, step_type: Any, discount: float
) -> None:
    at = changed(state, prey_alive=jnp.array(prey_alive), steps=jnp.int32(steps))
    _, timestep = step(at, jnp.full(3, STAY))
    assert timestep.step_type == step_type
    assert timestep.discount == discount


def test_episodes_are_batched_and_scanned(env: PredatorPreyJumanji) -> None:
    def episode(key: jax.Array) -> jax.Array:
        _, timesteps = jax.lax.scan(lambda state, _: env.step(state, jnp.full(3, CATCH)), env.reset(key)[0], length=12)
        return timesteps.last()

    last = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), 4))
    assert last.shape == (4, 12)
    assert last[:, -1].all()


def markers(env: PredatorPreyJumanji, state: State) -> dict[str, int]:
    """Counts the drawn entities of each kind by the text on them."""
    drawn: dict[str, int] = {}
    for kind, _, _ in PredatorPreyViewer(env.task)._entities(state.env_state):
        drawn[kind] = drawn.get(kind, 0) + 1
    return drawn


def test_the_viewer_draws_who_is_on_the_grid(state: State) -> None:
    changes = {"agents_active": jnp.array([True, False, True]), "prey_alive": jnp.array([True, False, True])}
    for remove_frozen, drawn in [
        (True, {"agent": 2, "stag": 1, "hare": 1}),
        (False, {"agent": 2, "frozen agent": 1, "stag": 1, "hare": 1}),
    ]:
        env = PredatorPreyJumanji(**SMALL, remove_frozen=remove_frozen)
        assert markers(env, changed(state, **changes)) == drawn


def test_a_picture_shows_agents_and_prey_in_their_colours(env: PredatorPreyJumanji, state: State) -> None:
    picture = np.asarray(env.render(state))
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73)):
        assert (picture[..., :3] == colour).all(-1).sum() > 500
    no_entity = changed(state, agents_active=jnp.zeros(3, bool), prey_alive=jnp.zeros(3, bool))
    empty = np.asarray(env.render(no_entity))
    assert empty.shape == picture.shape
    assert (empty != picture).any()
    env.close()


def test_an_animation_is_saved(env: PredatorPreyJumanji, state: State, step: Any, tmp_path: Path) -> None:
    states = [state]
    for _ in range(2):
        states.append(step(states[-1], jnp.zeros(3, jnp.int32))[0])
    env.animate(states, interval=50, save_path=str(tmp_path / "hunt.gif"))
    with Image.open(tmp_path / "hunt.gif") as saved:
        assert saved.n_frames == 3
    env.close()


@pytest.mark.parametrize(
    ("actions", "events"),
    [
        ([CATCH, CATCH], [("capture", 10.0, [0, 1])]),
        ([CATCH, STAY], [("miscapture", -2.0, [0, 1])]),
        ([STAY, STAY], []),
    ],
)
def test_a_film_marks_captures_and_miscaptures(actions: list[int], events: list[Any]) -> None:
    """Two agents with a stag between them; the mark is where the stag was."""
    env = PredatorPreyJumanji(world_shape=[1, 4], num_agents=2, num_stags=1, num_hares=0, punishment=-2.0)
    task = env.task
    before = task.reset(jax.random.key(0))._replace(
        agents_pos=jnp.array([[0, 0], [0, 2]]), prey_pos=jnp.array([[0, 1]])
    )
    joint_action, key = jnp.array(actions), jax.random.key(1)
    after, outcome = task.step(before, joint_action, key)
    moment = Moment(after, float(outcome.reward), before, joint_action, key)
    seen = [(kind, reward, position.tolist()) for kind, reward, position in task.viewer()._events(moment)]
    assert seen == events
    assert sum(reward for _, reward, _ in seen) == float(outcome.reward)
    assert list(task.viewer()._events(Moment(before, 0.0))) == []


def test_miscaptures_are_what_is_punished() -> None:
    """On random steps of a crowded grid: the reward is that of the captures and one punishment for each."""
    task = PredatorPreyJumanji(world_shape=[3, 3], num_agents=4, num_stags=2, num_hares=1, punishment=-1.5).task

    def one(key: Any) -> Any:
        state = task.reset(key)
        joint_action = jax.random.randint(key, (4,), 4, 6)
        after, outcome = task.step(state, joint_action, key)
        caught = state.prey_alive & ~after.prey_alive
        return outcome.reward, caught, task.miscaptures(state, joint_action, key)

    reward, caught, missed = map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200)))
    assert caught.any()
    assert missed.any()
    np.testing.assert_allclose(reward, caught @ np.array([10.0, 10.0, 1.0]) - 1.5 * missed.sum(-1))
    assert not (caught & missed).any()
