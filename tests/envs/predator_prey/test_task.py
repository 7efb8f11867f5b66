import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.config import load_group
from wqmix_jax.envs.predator_prey import CATCH, DOWN, LEFT, RIGHT, STAY, UP, EnvState, Noise, PredatorPrey, task
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build
from wqmix_jax.types import Array, Observation, StepOutcome

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("env_*.npz"))
SMALL = {"world_shape": [4, 5], "num_agents": 3, "num_stags": 2, "num_hares": 1, "obs_radius": 1}


def make(**overrides: Any) -> PredatorPrey:
    return build("env", load_group("env", "predator_prey") | overrides)


def from_reference(config: dict[str, Any]) -> PredatorPrey:
    """Builds the task of a recording from its options, which have the reference's names."""
    [stag_catchers, hare_catchers] = config["capture_action_conditions"]
    [radius] = set(config["agent_obs"])
    return make(
        world_shape=config["world_shape"],
        toroidal=config["toroidal"],
        num_agents=config["n_agents"],
        num_stags=config["n_stags"],
        num_hares=config["n_hare"],
        obs_radius=radius,
        punishment=config["miscapture_punishment"],
        stag_catchers=stag_catchers,
        hare_catchers=hare_catchers,
        reward_stag=config["reward_stag"],
        reward_hare=config["reward_hare"],
        capture_freezes=config["capture_freezes"],
        remove_frozen=config["remove_frozen"],
        episode_limit=config["episode_limit"],
    )


def place(
    agents: list[tuple[int, int]], prey: list[tuple[int, int]], *, frozen: tuple[int, ...] = (), steps: int = 0
) -> EnvState:
    return EnvState(
        agents_pos=jnp.array(agents, jnp.int32),
        prey_pos=jnp.array(prey, jnp.int32),
        prey_alive=jnp.ones(len(prey), bool),
        agents_active=jnp.array([index not in frozen for index in range(len(agents))]),
        steps=jnp.int32(steps),
    )


def in_turn(num_agents: int, num_prey: int, *, uniform: float = 0.0, prey_order: list[int] | None = None) -> Noise:
    """Returns noise without surprises: turns in the order of the index, and prey that take the first possible cell."""
    return Noise(
        agent_order=jnp.arange(num_agents, dtype=jnp.int32),
        prey_order=jnp.array(range(num_prey) if prey_order is None else prey_order, jnp.int32),
        prey_uniform=jnp.full(num_prey, uniform, jnp.float32),
    )


def transition(
    env: PredatorPrey, env_state: EnvState, joint_action: Array, noise: Noise
) -> tuple[EnvState, StepOutcome]:
    """Plays one step, not compiled: each hand-written case below is played only once."""
    with jax.disable_jit():
        return env.transition(env_state, joint_action, noise)


def observe(env: PredatorPrey, env_state: EnvState) -> Observation:
    """Observes a hand-written state, not compiled either."""
    with jax.disable_jit():
        return env.observe(env_state)


def random_play(env: PredatorPrey, num_episodes: int, num_steps: int) -> EnvState:
    """Returns every state of random play, leaves ``[num_steps * num_episodes, ..]``; it catches whenever it can."""

    def step(env_state: EnvState, key: jax.Array) -> tuple[EnvState, EnvState]:
        action_key, step_key = jax.random.split(key)
        move = jax.random.randint(action_key, (env.num_agents,), 0, 4, jnp.int32)
        action = jnp.where(env.observe(env_state).avail_actions[:, CATCH], CATCH, move)
        return env.step(env_state, action, step_key)[0], env_state

    def episode(key: jax.Array) -> EnvState:
        reset_key, play_key = jax.random.split(key)
        return jax.lax.scan(step, env.reset(reset_key), jax.random.split(play_key, num_steps))[1]

    played = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(3), num_episodes))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), played)


def random_states(env: PredatorPrey, size: int) -> EnvState:
    """Draws states with everyone anywhere, reachable or not, a third dead or frozen; leaves ``[size, ..]``."""
    rng = np.random.default_rng(4)
    rows, columns = env.world_shape
    cells = rng.permuted(np.tile(np.arange(rows * columns, dtype=np.int32), (size, 1)), axis=1)
    positions = jnp.array(np.stack(np.divmod(cells, columns), axis=-1))
    return EnvState(
        agents_pos=positions[:, : env.num_agents],
        prey_pos=positions[:, env.num_agents : env.num_agents + env.num_prey],
        prey_alive=jnp.array(rng.random((size, env.num_prey)) < 2 / 3),
        agents_active=jnp.array(rng.random((size, env.num_agents)) < 2 / 3),
        steps=jnp.zeros(size, jnp.int32),
    )


def assert_packing_is_lossless(env: PredatorPrey, states: EnvState) -> None:
    seen, compressed = jax.jit(jax.vmap(lambda env_state: (env.observe(env_state), env.compress(env_state))))(states)
    again = jax.jit(jax.vmap(env.decompress))(compressed)
    for left, right in zip(seen, again, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.fixture(scope="module", params=GOLDEN, ids=[path.stem for path in GOLDEN])
def recording(request: pytest.FixtureRequest) -> tuple[PredatorPrey, dict[str, np.ndarray]]:
    with np.load(request.param) as stored:
        arrays = dict(stored)
    return from_reference(json.loads(str(arrays["config_json"]))), arrays


def recorded_state(arrays: dict[str, np.ndarray], prefix: str) -> EnvState:
    active = arrays[f"{prefix}agents_active"]
    return EnvState(
        agents_pos=jnp.asarray(arrays[f"{prefix}agents_pos"], jnp.int32),
        prey_pos=jnp.asarray(arrays[f"{prefix}prey_pos"], jnp.int32),
        prey_alive=jnp.asarray(arrays[f"{prefix}prey_alive"], bool),
        agents_active=jnp.asarray(active, bool),
        steps=jnp.asarray(arrays.get(f"{prefix}steps", np.zeros(len(active))), jnp.int32),
    )


def test_recordings_are_there() -> None:
    assert GOLDEN


def test_every_recorded_step_is_replayed_exactly(recording: tuple[PredatorPrey, dict[str, np.ndarray]]) -> None:
    env, arrays = recording
    noise = Noise(
        agent_order=jnp.asarray(arrays["step/agent_order"], jnp.int32),
        prey_order=jnp.asarray(arrays["step/prey_order"], jnp.int32),
        prey_uniform=jnp.asarray(arrays["step/prey_uniform"], jnp.float32),
    )
    joint_action = jnp.asarray(arrays["step/actions"], jnp.int32)
    before, after = recorded_state(arrays, "step/pre_"), recorded_state(arrays, "step/post_")
    got, outcome = jax.jit(jax.vmap(env.transition))(before, joint_action, noise)

    np.testing.assert_array_equal(got.prey_alive, after.prey_alive)
    np.testing.assert_array_equal(got.agents_active, after.agents_active)
    np.testing.assert_array_equal(got.steps, after.steps)
    np.testing.assert_array_equal(got.prey_pos[after.prey_alive], after.prey_pos[after.prey_alive])
    on_grid = after.agents_active | (not env.remove_frozen)
    np.testing.assert_array_equal(got.agents_pos[on_grid], after.agents_pos[on_grid])

    at_limit = arrays["step/episode_limit"].astype(bool)
    np.testing.assert_array_equal(outcome.reward, arrays["step/reward"])
    np.testing.assert_array_equal(outcome.truncated, at_limit)
    np.testing.assert_array_equal(outcome.terminated, arrays["step/terminated"].astype(bool) & ~at_limit)
    assert outcome.reward.dtype == jnp.float32


@pytest.mark.parametrize("stored", [False, True], ids=["observed", "compressed"])
def test_recorded_states_are_seen_exactly(recording: tuple[PredatorPrey, dict[str, np.ndarray]], stored: bool) -> None:
    env, arrays = recording
    first, after = recorded_state(arrays, "init/"), recorded_state(arrays, "step/post_")
    see = (lambda env_state: env.decompress(env.compress(env_state))) if stored else env.observe
    seen = jax.jit(jax.vmap(see))(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, after))
    for got, name in [(seen.obs, "obs"), (seen.state, "state"), (seen.avail_actions, "avail")]:
        np.testing.assert_array_equal(got, np.concatenate([arrays[f"init/{name}"], arrays[f"step/post_{name}"]]))
    assert (seen.obs.dtype, seen.state.dtype, seen.avail_actions.dtype) == (jnp.float32, jnp.float32, jnp.bool_)


def test_recordings_hold_what_is_hard() -> None:
    """Otherwise the replay above would prove little."""
    stats = []
    for path in GOLDEN:
        with np.load(path) as stored:
            stats.append(json.loads(str(stored["stats_json"])))
    for event in ("double_miscapture_steps", "capture_and_miscapture_steps", "prey_stuck", "term_natural_at_limit"):
        assert sum(each[event] for each in stats) > 0


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        SMALL | {"toroidal": True, "remove_frozen": False},
        {"world_shape": [16, 17]},  # one cell more than a byte counts
        {"world_shape": [1, 20], "obs_radius": 0},
    ],
    ids=["base", "toroidal", "wide", "line"],
)
def test_a_packed_state_is_seen_bit_for_bit(overrides: dict[str, Any]) -> None:
    env = make(**overrides)
    assert_packing_is_lossless(env, random_states(env, 200))
    rows, columns = env.world_shape
    compressed = jax.eval_shape(lambda: env.compress(env.reset(jax.random.key(0))))
    assert compressed.cells.dtype == (jnp.uint8 if rows * columns <= 256 else jnp.uint16)


def test_a_step_of_the_papers_task_is_packed_into_18_bytes() -> None:
    compressed = jax.eval_shape(lambda: make().compress(make().reset(jax.random.key(0))))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(compressed)) == 18


def test_padding_unpacks_to_finite_numbers() -> None:
    env = make()
    template = jax.eval_shape(lambda: env.compress(env.reset(jax.random.key(0))))
    seen = jax.jit(env.decompress)(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template))
    assert all(np.isfinite(leaf).all() for leaf in seen)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 75, 300])
def test_ones_are_placed_alike_on_all_platforms(size: int) -> None:
    """Whichever form a platform takes; features may coincide, and -1 is nowhere."""
    features = jax.random.randint(jax.random.key(size), (5, 3, 16), -1, size)
    expected = np.zeros((5, 3, size), np.float32)
    for index, feature in np.ndenumerate(np.array(features)):
        if feature >= 0:
            expected[*index[:2], feature] = 1
    for ones in (task._ones_at, task._ones_by_word, task._ones_by_place):
        np.testing.assert_array_equal(ones(features, size), expected)


def test_random_play_keeps_everyone_apart_and_inside() -> None:
    env = make(**SMALL)
    states = random_play(env, 64, 60)
    assert not states.prey_alive.all()
    cells = np.asarray(jnp.concatenate([states.agents_pos, states.prey_pos], axis=1) @ jnp.array([5, 1]))
    standing = np.asarray(jnp.concatenate([states.agents_active, states.prey_alive], axis=1))
    for each, present in zip(cells, standing, strict=True):
        assert len(set(each[present])) == present.sum()
    for positions in (states.agents_pos, states.prey_pos):
        assert positions.min() == 0
        assert positions.max(axis=(0, 1)).tolist() == [3, 4]
    assert_packing_is_lossless(env, states)


def test_reset_places_everyone_on_distinct_cells_uniformly() -> None:
    env = make(**SMALL)
    states = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 4000))
    cells = np.asarray(jnp.concatenate([states.agents_pos, states.prey_pos], axis=1) @ jnp.array([5, 1]))
    assert all(len(set(row)) == 6 for row in cells)
    for entity in cells.T:
        # 200 expected on each of the 20 cells, with a standard deviation of 13.8.
        counts = np.bincount(entity, minlength=20)
        assert abs(counts - 200).max() < 5 * 13.8
    assert states.prey_alive.all()
    assert states.agents_active.all()
    assert not states.steps.any()


def test_noise_has_uniform_marginals() -> None:
    env = make(**SMALL)
    noise = jax.jit(jax.vmap(env.sample_noise))(jax.random.split(jax.random.key(1), 6000))
    for order in (noise.agent_order, noise.prey_order):
        np.testing.assert_array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(3), (6000, 3)))
        kinds, counts = np.unique(np.asarray(order), axis=0, return_counts=True)
        assert len(kinds) == 6
        assert abs(counts - 1000).max() < 5 * 29  # the standard deviation is 28.9
    uniform = np.asarray(noise.prey_uniform)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    counts = np.histogram(uniform, bins=10, range=(0, 1))[0]
    assert abs(counts - 1800).max() < 5 * 40.3
    # Draws for one purpose are independent of those for another.
    assert abs(np.corrcoef(noise.agent_order[:, 0], noise.prey_order[:, 0])[0, 1]) < 5 / np.sqrt(6000)


def test_step_is_transition_with_sampled_noise() -> None:
    env = make(**SMALL)
    start, key = place([(0, 0), (3, 4), (1, 1)], [(2, 2), (3, 3), (1, 2)]), jax.random.key(6)
    joint_action = jnp.array([RIGHT, DOWN, CATCH], jnp.int32)
    expected = jax.jit(env.transition)(start, joint_action, jax.jit(env.sample_noise)(key))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(env.step)(start, joint_action, key), expected)


def test_a_lone_catcher_beside_two_stags_is_punished_for_each() -> None:
    env = make(num_agents=2, num_stags=2)
    start = place([(4, 4), (0, 0)], [(4, 3), (4, 5)])
    after, outcome = transition(env, start, jnp.array([CATCH, STAY]), in_turn(2, 2))
    assert outcome.reward == -4
    assert after.prey_alive.all()
    assert after.agents_active.all()


def test_two_catchers_beside_two_stags_catch_one() -> None:
    env = make(num_agents=2, num_stags=2)
    start = place([(4, 4), (5, 5)], [(4, 5), (5, 4)])
    after, outcome = transition(env, start, jnp.array([CATCH, CATCH]), in_turn(2, 2, prey_order=[1, 0]))
    assert outcome.reward == 10
    np.testing.assert_array_equal(after.prey_alive, [True, False])
    assert not after.agents_active.any()
    assert outcome.terminated
    assert not outcome.truncated


@pytest.mark.parametrize(("prey_order", "reward"), [([0, 1], 10), ([1, 0], 8)])
def test_a_miscapture_beside_a_capture_counts_if_it_comes_first(prey_order: list[int], reward: float) -> None:
    env = make(num_agents=2, num_stags=2)
    start = place([(4, 4), (4, 6)], [(4, 5), (4, 3)])
    _, outcome = transition(env, start, jnp.array([CATCH, CATCH]), in_turn(2, 2, prey_order=prey_order))
    assert outcome.reward == reward


@pytest.mark.parametrize("punishment", [0, -1.25, -5])
def test_the_punishment_is_the_options(punishment: float) -> None:
    env = make(num_agents=2, num_stags=1, punishment=punishment)
    _, outcome = transition(env, place([(4, 4), (9, 9)], [(4, 3)]), jnp.array([CATCH, STAY]), in_turn(2, 1))
    assert outcome.reward == punishment


def test_a_hare_needs_one_catcher() -> None:
    env = make(num_agents=2, num_stags=0, num_hares=1)
    after, outcome = transition(env, place([(4, 4), (9, 9)], [(4, 3)]), jnp.array([CATCH, STAY]), in_turn(2, 1))
    assert outcome.reward == 1
    assert not after.prey_alive.any()
    assert env.metrics(after) == {"captures": 1.0}


def test_a_later_prey_enters_the_cell_of_a_removed_agent_alone() -> None:
    start = place([(0, 0), (1, 1)], [(0, 1), (1, 0)])
    for remove_frozen, cell in [(True, (1, 1)), (False, (2, 0))]:
        env = make(num_agents=2, num_stags=2, remove_frozen=remove_frozen)
        after, _ = transition(env, start, jnp.array([CATCH, CATCH]), in_turn(2, 2))
        assert tuple(after.prey_pos[1].tolist()) == cell


@pytest.mark.parametrize("natural", [False, True])
def test_an_end_at_the_time_limit_is_a_truncation(natural: bool) -> None:
    env = make(num_agents=2, num_stags=1, episode_limit=7)
    start = place([(4, 4), (4, 6)], [(4, 5)], steps=6)
    action = jnp.array([CATCH, CATCH if natural else STAY])
    _, outcome = transition(env, start, action, in_turn(2, 1))
    assert outcome.reward == (10 if natural else -2)
    assert outcome.truncated
    assert not outcome.terminated


def test_an_earlier_step_neither_truncates_nor_terminates() -> None:
    env = make(num_agents=2, num_stags=1, episode_limit=7)
    _, outcome = transition(env, place([(0, 0), (4, 6)], [(4, 4)], steps=5), jnp.array([UP, LEFT]), in_turn(2, 1))
    assert not outcome.truncated
    assert not outcome.terminated


def test_agents_queue_in_their_order() -> None:
    env = make(num_agents=2, num_stags=1)
    start = place([(0, 1), (0, 0)], [(9, 9)])
    action = jnp.array([RIGHT, RIGHT])
    noise = in_turn(2, 1)
    ahead, _ = transition(env, start, action, noise)
    np.testing.assert_array_equal(ahead.agents_pos, [(0, 2), (0, 1)])
    behind, _ = transition(env, start, action, noise._replace(agent_order=jnp.array([1, 0])))
    np.testing.assert_array_equal(behind.agents_pos, [(0, 2), (0, 0)])


@pytest.mark.parametrize("action", [UP, LEFT, STAY, CATCH, 6, 255, -1])
def test_an_action_that_cannot_be_done_changes_nothing(action: int) -> None:
    """Moves into a wall, a catch of nothing, numbers that are no action."""
    env = make(num_agents=2, num_stags=1)
    start = place([(0, 0), (9, 0)], [(9, 9)])
    after, outcome = transition(env, start, jnp.array([action, STAY]), in_turn(2, 1))
    np.testing.assert_array_equal(after.agents_pos, start.agents_pos)
    assert outcome.reward == 0
    assert after.agents_active.all()
    assert after.prey_alive.all()


@pytest.mark.parametrize("remove_frozen", [False, True])
@pytest.mark.parametrize("action", range(6))
def test_a_frozen_agent_acts_not_at_all(action: int, remove_frozen: bool) -> None:
    env = make(num_agents=2, num_stags=1, remove_frozen=remove_frozen)
    start = place([(4, 4), (4, 6)], [(4, 5)], frozen=(0,))
    after, outcome = transition(env, start, jnp.array([action, CATCH]), in_turn(2, 1))
    np.testing.assert_array_equal(after.agents_pos, start.agents_pos)
    assert outcome.reward == -2  # its partner is alone
    assert after.prey_alive.all()


def test_a_frozen_agent_can_only_stay() -> None:
    env = make(num_agents=2, num_stags=1)
    seen = observe(env, place([(4, 4), (4, 6)], [(4, 5)], frozen=(0,)))
    np.testing.assert_array_equal(seen.avail_actions[0], np.arange(6) == STAY)
    assert seen.avail_actions[1].all()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.int32])
def test_any_integer_holds_actions(dtype: Any) -> None:
    env = make(num_agents=2, num_stags=1)
    after, _ = transition(env, place([(0, 0), (9, 0)], [(9, 9)]), jnp.array([RIGHT, UP], dtype), in_turn(2, 1))
    np.testing.assert_array_equal(after.agents_pos, [(0, 1), (8, 0)])


def test_the_largest_uniform_takes_the_last_possible_cell() -> None:
    env = make(num_agents=2, num_stags=1)
    noise = in_turn(2, 1)._replace(prey_uniform=jnp.array([np.nextafter(np.float32(1), np.float32(0))]))
    # Up is the last of four, left the last of the three that the wall leaves.
    for start, end in [((5, 5), (4, 5)), ((0, 5), (0, 4))]:
        after, _ = transition(env, place([(9, 9), (9, 8)], [start]), jnp.array([STAY, STAY]), noise)
        assert tuple(after.prey_pos[0].tolist()) == end


def test_a_prey_that_is_shut_in_rests() -> None:
    env = make(num_agents=2, num_stags=1)
    after, _ = transition(env, place([(0, 1), (1, 0)], [(0, 0)]), jnp.array([STAY, STAY]), in_turn(2, 1))
    assert tuple(after.prey_pos[0].tolist()) == (0, 0)


def test_the_edges_of_a_torus_meet_for_moves_but_not_for_catches() -> None:
    env = make(num_agents=2, num_stags=1, toroidal=True)
    start = place([(0, 4), (5, 5)], [(9, 4)])
    seen = observe(env, start)
    assert seen.avail_actions[0].all()
    assert seen.obs.reshape(2, 5, 5, 3)[0].sum() == 1  # a view never wraps: the agent sees itself alone
    after, outcome = transition(env, start, jnp.array([CATCH, STAY]), in_turn(2, 1))
    assert outcome.reward == 0
    assert after.prey_alive.all()
    after, _ = transition(env, place([(0, 4), (5, 5)], [(7, 7)]), jnp.array([UP, STAY]), in_turn(2, 1))
    np.testing.assert_array_equal(after.agents_pos[0], (9, 4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"punishment": 2}, "env.punishment=2 is not allowed: input should be less than or equal to 0"),
        ({"punishment": "much"}, "env.punishment='much' is not allowed: input should be a valid number"),
        ({"punishment": float("nan")}, "env.punishment=nan is not allowed: input should be a finite number"),
        ({"num_agents": 0}, "env.num_agents=0 is not allowed: input should be greater than 0"),
        ({"num_agents": 8.5}, "env.num_agents=8.5 is not allowed: input should be a valid integer"),
        ({"num_hares": -1}, "env.num_hares=-1 is not allowed: input should be greater than or equal to 0"),
        ({"obs_radius": -1}, "env.obs_radius=-1 is not allowed: input should be greater than or equal to 0"),
        ({"stag_catchers": 0}, "env.stag_catchers=0 is not allowed: input should be greater than 0"),
        ({"episode_limit": 0}, "env.episode_limit=0 is not allowed: input should be greater than 0"),
        ({"toroidal": 1}, "env.toroidal=1 is not allowed: input should be a valid boolean"),
        ({"world_shape": [10, 0]}, "env.world_shape.1=0 is not allowed: input should be greater than 0"),
        ({"world_shape": []}, "env.world_shape=[] is not allowed: it has 0 value(s), which is too few"),
        ({"world_shape": [10]}, "env.world_shape=[10] is not allowed: it has 1 value(s), which is too few"),
        (
            {"world_shape": [10, 10, 10]},
            "env.world_shape=[10, 10, 10] is not allowed: tuple should have at most 2 items after validation, not 3",
        ),
        (
            {"world_shape": [3, 5]},
            "env.world_shape=(3, 5) is not allowed: its 15 cells must hold num_agents + num_stags + num_hares = 16, "
            "one to a cell",
        ),
        (
            {"num_stags": 0},
            "env.num_stags=0 and num_hares=0 are not allowed together: at least one prey is needed",
        ),
    ],
)
def test_an_option_out_of_range_is_refused_in_one_line(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(**overrides)
    assert str(refused.value) == message


def test_a_full_board_is_played() -> None:
    env = make(world_shape=[2, 2], num_agents=2, num_stags=2)
    start = place([(0, 0), (1, 1)], [(0, 1), (1, 0)])
    after, _ = transition(env, start, jnp.array([RIGHT, LEFT]), in_turn(2, 2))
    np.testing.assert_array_equal(after.agents_pos, start.agents_pos)
    np.testing.assert_array_equal(after.prey_pos, start.prey_pos)


def test_dtypes_stay_narrow_under_x64() -> None:
    env = make(**SMALL)

    def play() -> tuple[EnvState, StepOutcome, Observation]:
        after, outcome = env.step(env.reset(jax.random.key(0)), jnp.zeros(3, jnp.int32), jax.random.key(1))
        return after, outcome, env.decompress(env.compress(after))

    with jax.enable_x64(True):
        after, outcome, seen = jax.eval_shape(play)
    assert [leaf.dtype for leaf in after] == [jnp.int32, jnp.int32, jnp.bool_, jnp.bool_, jnp.int32]
    assert outcome.reward.dtype == seen.obs.dtype == seen.state.dtype == jnp.float32


def by_hand(
    env: PredatorPrey, state: dict[str, np.ndarray], joint_action: np.ndarray, noise: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], float]:
    """Plays one step agent by agent and prey by prey, as the rules say it."""
    shape, moves = np.array(env.world_shape), np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])

    def inside(position: np.ndarray) -> np.ndarray:
        return position % shape if env.toroidal else np.clip(position, 0, shape - 1)

    agents, prey = state["agents_pos"].copy(), state["prey_pos"].copy()
    alive, active = state["prey_alive"].copy(), state["agents_active"].copy()

    def is_free(cell: np.ndarray) -> bool:
        on_grid = active if env.remove_frozen else np.ones_like(active)
        return not (on_grid & (agents == cell).all(1)).any() and not (alive & (prey == cell).all(1)).any()

    for agent in noise["agent_order"]:
        if active[agent] and joint_action[agent] < STAY:
            goal = inside(agents[agent] + moves[joint_action[agent]])
            if is_free(goal):
                agents[agent] = goal
    reward = 0.0
    for index in noise["prey_order"]:
        if not alive[index]:
            continue
        near = np.abs(agents - prey[index]).sum(1) == 1
        catchers = near & (joint_action == CATCH) & active
        is_stag = index < env.num_stags
        if catchers.sum() >= (env.stag_catchers if is_stag else env.hare_catchers):
            alive[index] = False
            reward += env.reward_stag if is_stag else env.reward_hare
            active &= ~(catchers & env.capture_freezes)
            continue
        reward += env.punishment if catchers.any() else 0
        free = [goal for goal in inside(prey[index] + moves) if is_free(goal)]
        if free:
            prey[index] = free[int(np.floor(noise["prey_uniform"][index] * np.float32(len(free))))]
    return {"agents_pos": agents, "prey_pos": prey, "prey_alive": alive, "agents_active": active}, reward


CROWDED = {"world_shape": [4, 5], "num_agents": 4, "num_stags": 3, "num_hares": 2}


@pytest.mark.parametrize(
    "overrides",
    [
        CROWDED,
        CROWDED | {"toroidal": True, "remove_frozen": False},
        CROWDED | {"capture_freezes": False},
        {"world_shape": [9, 10], "num_agents": 34, "num_stags": 30, "num_hares": 5},  # flags of several words
    ],
    ids=["crowded", "toroidal", "unfrozen", "many"],
)
def test_a_step_follows_the_rules_turn_by_turn(overrides: dict[str, Any]) -> None:
    env, size, rng = make(**overrides), 60, np.random.default_rng(5)
    states = random_states(env, size)
    joint_action = rng.choice(6, (size, env.num_agents), p=[0.15] * 4 + [0.05, 0.35]).astype(np.int32)
    noise = jax.jit(jax.vmap(env.sample_noise))(jax.random.split(jax.random.key(2), size))
    after, outcome = jax.jit(jax.vmap(env.transition))(states, joint_action, noise)
    caught = 0
    for index in range(size):
        state, drawn = (
            {name: np.array(leaf[index]) for name, leaf in tree._asdict().items()} for tree in (states, noise)
        )
        expected, reward = by_hand(env, state, joint_action[index], drawn)
        for name, leaf in expected.items():
            np.testing.assert_array_equal(getattr(after, name)[index], leaf, err_msg=f"{name} of state {index}")
        assert outcome.reward[index] == reward
        caught += (expected["prey_alive"] != state["prey_alive"]).sum()
    assert caught > 3


def test_a_step_has_neither_loops_nor_draws_on_an_accelerator() -> None:
    env = make()

    def lowered(function: Any, *args: Any) -> str:
        return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()

    state, key = jax.eval_shape(lambda: env.reset(jax.random.key(0))), jax.eval_shape(lambda: jax.random.key(0))
    joint_action, noise = jax.ShapeDtypeStruct((8,), jnp.int32), jax.eval_shape(env.sample_noise, key)
    text = lowered(env.transition, state, joint_action, noise)
    assert "while" not in text
    assert "threefry" not in text
    assert "threefry" in lowered(env.step, state, joint_action, key)  # or nothing would be seen above
