import jax
import jax.numpy as jnp
import numpy as np

from tests.environments import TINY, Clock, Counting, Leaver, by_seed, tiny_masac, tiny_wqmix
from wqmix_jax.algos.base import Context, hyperparams
from wqmix_jax.config import load_group
from wqmix_jax.options import build
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.rollout import rollout

CLOCK = Clock(episode_limit=7, ends_from=4)


def play(env, algo, *, num_envs=1, epsilon=0.0, num_seeds=1, scale=1.0):
    params = jax.vmap(lambda key: algo.init(key, env.spec))(jax.random.split(jax.random.key(0), num_seeds))
    params = jax.tree.map(lambda leaf: leaf * scale, params)
    each = lambda value: jnp.full(num_seeds, value)  # noqa: E731
    ctx = Context(each(jnp.float32(epsilon)), each(jnp.int32(0)), each(jnp.int32(0)))
    hp = jax.tree.map(each, hyperparams(algo))
    keys = jax.random.split(jax.random.key(1), num_seeds)
    return params, jax.jit(lambda: rollout(env, algo, params, hp, ctx, keys, num_envs=num_envs))()


def decoded(env, played):
    """The first seed's episodes as the learner sees them."""
    replay = make_replay(env, buffer_size=64, batch_size=1)
    episodes = jax.tree.map(lambda leaf: leaf[0], played.episodes)
    state = replay.add(replay.init(), episodes, jnp.bool_(True))
    rows = state.experience[0, : episodes.length.shape[0]]
    return replay.decode(rows, env.spec.episode_limit)


def test_last_action_and_carry_start_afresh_and_move_by_one_each_step():
    """Agent 0 answers its last action, agent 1 counts in its carry: both play 0, 1, 2 and the task ends there."""
    algo = build("algo", {"_target_": "tests.environments.Counting", **TINY})
    assert isinstance(algo, Counting)
    _, played = play(Clock(episode_limit=7, ends_from=0), algo, num_envs=2)
    np.testing.assert_array_equal(played.episodes.joint_action[0, 0], [[0, 0], [1, 1], [2, 2]] + [[0, 0]] * 4)
    np.testing.assert_array_equal(played.episodes.length, [[3, 3]])
    np.testing.assert_array_equal(played.episodes.terminated, [[True, True]])
    np.testing.assert_array_equal(played.episode_return, [[6.0, 6.0]])


def test_a_time_limit_cuts_without_terminating_and_a_true_end_terminates():
    algo = build("algo", {"_target_": "tests.environments.Counting", **TINY})
    _, cut = play(Clock(episode_limit=7, ends_from=7), algo)
    episode = decoded(Clock(episode_limit=7, ends_from=7), cut)
    np.testing.assert_array_equal(episode.mask, np.ones((1, 7)))
    np.testing.assert_array_equal(episode.discount, np.ones((1, 7)))
    np.testing.assert_array_equal(episode.reward, [np.arange(1, 8)])
    np.testing.assert_array_equal(episode.obs[0, :, 0, 0], np.arange(8))  # the observation at the cut included
    ended = decoded(CLOCK, play(CLOCK, algo)[1])
    np.testing.assert_array_equal(ended.mask, [[1, 1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(ended.discount, [[1, 1, 1, 1, 1, 0, 1]])
    np.testing.assert_array_equal(ended.obs[0, :, 0, 0], [0, 1, 2, 3, 4, 5, 6, 0])
    np.testing.assert_array_equal(ended.avail_actions[0, 7], np.zeros((2, 3), bool))


def test_the_learner_sees_exactly_what_the_agents_saw():
    """Unrolling the stored episodes gives the greedy actions that were played, at every real step of every episode.

    It fails when the recurrent state, the last action or the observation is off by one step in either place.
    """
    env = build("env", load_group("env", "predator_prey") | {"episode_limit": 30, "world_shape": [5, 5]})
    algo = tiny_wqmix()
    params, played = play(env, algo, num_envs=8, scale=5.0)  # large weights: choices that follow every input
    batch = decoded(env, played)
    one = jax.tree.map(lambda leaf: leaf[0], params)

    def best(batch):
        agent_qs = np.array(algo.unroll(one["agent"], batch))[:, :-1]
        return np.where(batch.avail_actions[:, :-1], agent_qs, -np.inf).argmax(-1)[np.array(batch.mask) > 0]

    chosen = np.array(batch.joint_action)[np.array(batch.mask) > 0]
    np.testing.assert_array_equal(best(batch), chosen)
    for late in ({"joint_action": jnp.roll(batch.joint_action, 1, 1)}, {"obs": jnp.roll(batch.obs, 1, 1)}):
        assert (best(batch._replace(**late)) != chosen).mean() > 0.01  # or a slip would not show


def test_exploring_agents_never_choose_what_is_unavailable():
    _, played = play(CLOCK, tiny_wqmix(), num_envs=16, epsilon=1.0)
    batch = decoded(CLOCK, played)
    taken = np.take_along_axis(np.array(batch.avail_actions)[:, :-1], np.array(batch.joint_action)[..., None], -1)[
        ..., 0
    ]
    assert taken[np.array(batch.mask) > 0].all()
    assert len(np.unique(played.episodes.length)) > 1


def test_an_agent_without_an_available_action_plays_and_learns_action_0():
    """It leaves after the first step; the others' draws never depend on it."""
    env = Leaver(episode_limit=5, ends_from=9)
    for algo in (tiny_wqmix(), tiny_masac()):
        _, played = play(env, algo, num_envs=8, epsilon=1.0)
        joint_action = np.array(played.episodes.joint_action)[0]
        assert (joint_action[:, 1:, 1] == 0).all()
        assert len(np.unique(joint_action[:, 1:, 0])) > 1
        avail = np.array(decoded(env, played).avail_actions)
        np.testing.assert_array_equal(avail[:, 1:, 1], np.broadcast_to([True, False, False], avail[:, 1:, 1].shape))
        np.testing.assert_array_equal(avail[:, 0, 1], np.broadcast_to([False, True, True], avail[:, 0, 1].shape))
        assert avail[:, :, 0].all()


def test_a_seed_plays_the_same_alone_and_in_company():
    algo = tiny_wqmix()
    params = jax.vmap(lambda key: algo.init(key, CLOCK.spec))(jax.random.split(jax.random.key(0), 3))
    keys = jax.random.split(jax.random.key(1), 3)
    ctx, hp = Context(jnp.float32(0.5), jnp.int32(0), jnp.int32(0)), hyperparams(algo)
    each = lambda tree, n: jax.tree.map(lambda leaf: jnp.full(n, leaf), tree)  # noqa: E731
    together = rollout(CLOCK, algo, params, each(hp, 3), each(ctx, 3), keys, num_envs=4)
    alone = rollout(
        CLOCK,
        algo,
        by_seed(jax.tree.map(lambda leaf: leaf[1], params)),
        each(hp, 1),
        each(ctx, 1),
        keys[1:2],
        num_envs=4,
    )
    for many, one in zip(jax.tree.leaves(together.episodes), jax.tree.leaves(alone.episodes), strict=True):
        np.testing.assert_array_equal(many[1], one[0])
