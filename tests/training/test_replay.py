import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import Clock
from wqmix_jax.config import load_group
from wqmix_jax.options import build
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.row_packing import first_fit_rows
from wqmix_jax.types import Episode, StoredEpisode


def predator_prey(**changes):
    return build("env", load_group("env", "predator_prey") | changes)


@functools.partial(jax.jit, static_argnums=0)  # compiled once; operation by operation it takes many times as long
def plain_episode(env, key, length, terminated):
    """Returns a random walk twice: compact as the replay takes it, and as plain float32 arrays."""
    limit, (num_agents, num_actions) = env.spec.episode_limit, env.spec[:2]
    action_keys, step_keys = jax.random.split(key, (2, limit))
    actions = jax.vmap(lambda k: jax.random.randint(k, (num_agents,), 0, num_actions))(action_keys)
    first = env.reset(key)

    def step(env_state, inputs):
        following, outcome = env.step(env_state, *inputs)
        return following, (following, outcome.reward)

    _, (states, rewards) = jax.lax.scan(step, first, (actions, step_keys))
    states = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), first, states)
    real, seen = jnp.arange(limit) < length, jnp.arange(limit + 1) <= length
    cut = lambda keep, leaf: jnp.where(keep.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))  # noqa: E731
    stored = StoredEpisode(
        steps=jax.tree.map(lambda leaf: cut(seen, leaf), jax.vmap(env.compress)(states)),
        joint_action=cut(real, actions).astype(jnp.uint8),
        reward=cut(real, rewards),
        length=jnp.int32(length),
        terminated=jnp.bool_(terminated),
    )
    observation = jax.tree.map(lambda leaf: cut(seen, leaf), jax.vmap(env.observe)(states))
    ends = terminated & (jnp.arange(limit) == length - 1)
    return stored, Episode(
        *observation,
        joint_action=cut(real, actions),
        reward=cut(real, rewards),
        discount=1.0 - ends.astype(jnp.float32),
        mask=real.astype(jnp.float32),
    )


def decoded(replay, rows, num_steps):
    return jax.jit(replay.decode, static_argnums=1)(rows, num_steps)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize("env", [predator_prey(episode_limit=12), Clock(episode_limit=12, ends_from=3)])
def test_samples_are_bit_identical_to_a_plain_float32_replay(env):
    """Their states distinguish episodes; 5 are stored where 4 fit, so the first is gone."""
    replay = make_replay(env, buffer_size=4, batch_size=4)
    ends = [(12, False), (12, True), (1, True), (7, False), (9, True)]
    pairs = [plain_episode(env, jax.random.key(i), length, ended) for i, (length, ended) in enumerate(ends)]
    state = replay.init()
    for stored, _ in pairs:
        state = replay.add(state, jax.tree.map(lambda leaf: leaf[None], stored), jnp.bool_(True))
    rows = jax.vmap(replay.sample, (None, 0))(state, jax.random.split(jax.random.key(9), 5)).reshape(20, -1)
    batch = decoded(replay, rows, 12)
    plain = stacked([episode for _, episode in pairs])
    drawn = [int(np.flatnonzero((np.array(plain.state) == state_).all((1, 2)))[-1]) for state_ in np.array(batch.state)]
    assert set(drawn) == {1, 2, 3, 4}
    assert batch.starts is None
    plain = jax.tree.map(lambda leaf: leaf[jnp.array(drawn)], plain)
    np.testing.assert_array_equal(batch.compact(), plain.obs)
    for ours, expected in zip(*map(jax.tree.leaves, (batch._replace(compact=None), plain)), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


def test_a_cut_batch_is_the_beginning_of_the_whole_one():
    env = predator_prey(episode_limit=12)
    replay = make_replay(env, buffer_size=4, batch_size=4)
    pairs = [plain_episode(env, jax.random.key(i), 5, True) for i in range(4)]
    state = replay.add(replay.init(), stacked([stored for stored, _ in pairs]), jnp.bool_(True))
    rows = replay.sample(state, jax.random.key(0))
    whole, cut = decoded(replay, rows, 12), decoded(replay, rows, 6)
    np.testing.assert_array_equal(replay.lengths(rows), [5] * 4)
    for full, short in zip(*map(jax.tree.leaves, (whole, cut)), strict=True):
        np.testing.assert_array_equal(full[:, : short.shape[1]], short)


def test_a_batch_can_be_longer_than_its_episodes():
    """Its end is padding as after an episode: zero, but for discounts."""
    env = predator_prey(episode_limit=12)
    replay = make_replay(env, buffer_size=4, batch_size=4)
    pairs = [plain_episode(env, jax.random.key(i), length, False) for i, length in enumerate((12, 12, 5, 1))]
    state = replay.add(replay.init(), stacked([stored for stored, _ in pairs]), jnp.bool_(True))
    whole, padded = (decoded(replay, state.experience[0], num_steps) for num_steps in (12, 15))
    assert (padded.obs.shape[1], padded.mask.shape[1]) == (16, 15)
    for name in Episode._fields[:7]:
        full, longer = getattr(whole, name), getattr(padded, name)
        np.testing.assert_array_equal(longer[:, : full.shape[1]], full)
        assert (longer[:, full.shape[1] :] == (name == "discount")).all()


def test_padding_is_zero_even_where_the_first_state_is_stored_as_zero():
    """The observation of an mmdp's state 0 is [1, 0], and the state is stored as its number."""
    env = build("env", load_group("env", "mmdp") | {"game": "two_state", "episode_limit": 12})
    replay = make_replay(env, buffer_size=4, batch_size=4)
    lengths = np.array([12, 7, 5, 1])
    pairs = [plain_episode(env, jax.random.key(i), length, False) for i, length in enumerate(lengths)]
    state = replay.add(replay.init(), stacked([stored for stored, _ in pairs]), jnp.bool_(True))
    batch = decoded(replay, state.experience[0], 12)
    expected = np.broadcast_to((np.arange(13) <= lengths[:, None])[..., None], (4, 13, 2))  # of two agents
    np.testing.assert_array_equal(batch.obs.sum(-1), expected)
    np.testing.assert_array_equal(batch.compact(), batch.obs)


@pytest.mark.parametrize("env", [predator_prey(episode_limit=12), Clock(episode_limit=12, ends_from=3)])
def test_a_packed_batch_has_what_the_whole_one_has_at_each_place(env):
    """Three of the four episodes share a row; everything else is zero."""
    replay = make_replay(env, buffer_size=4, batch_size=4)
    ends = [(12, False), (2, True), (1, True), (6, False)]
    pairs = [plain_episode(env, jax.random.key(i), *end) for i, end in enumerate(ends)]
    state = replay.add(replay.init(), stacked([stored for stored, _ in pairs]), jnp.bool_(True))
    rows = state.experience[0]
    layout, num_rows = first_fit_rows(replay.lengths(rows), 12)
    assert int(num_rows) == 2
    whole, packed = decoded(replay, rows, 12), jax.jit(replay.decode_packed)(rows, layout)
    np.testing.assert_array_equal(packed.starts, layout.filled & (layout.step == 0))
    assert int(packed.starts.sum()) == 4
    assert int(packed.mask.sum()) == 12 + 2 + 1 + 6
    assert int((1 - packed.discount).sum()) == 2
    for name in Episode._fields[:7]:
        plain, ours = np.array(getattr(whole, name)), np.array(getattr(packed, name))
        nothing = np.full(plain.shape[2:], name == "discount", plain.dtype)
        for row, place in np.ndindex(ours.shape[:2]):
            episode, step = int(layout.episode[row, place]), int(layout.step[row, place])
            is_real = layout.filled[row, place] and step < plain.shape[1]
            np.testing.assert_array_equal(ours[row, place], plain[episode, step] if is_real else nothing)


def test_nothing_changes_where_nothing_is_kept():
    """A finished seed's replay stays as it is, to the bit, while others continue; also where the rows wrap around."""
    env = Clock(episode_limit=3, ends_from=3)
    replay = make_replay(env, buffer_size=3, batch_size=2)
    episodes = stacked([plain_episode(env, jax.random.key(i), 3, False)[0] for i in range(2)])
    state = replay.add(replay.init(), episodes, jnp.bool_(True))
    kept = replay.add(state, jax.tree.map(lambda leaf: leaf + leaf, episodes), jnp.bool_(False))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, kept))
    added = replay.add(state, episodes, jnp.bool_(True))
    assert int(added.current_index) == 1
    assert bool(added.is_full)


def test_a_seed_of_the_papers_task_fits_in_64_megabytes():
    replay = make_replay(predator_prey(), buffer_size=5000, batch_size=32)
    held = jax.eval_shape(replay.init)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held)) <= 64 * 2**20
    assert held.experience.shape == (1, 5000, replay.row_bytes)
    assert replay.num_bytes == 5000 * replay.row_bytes
