import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import TINY, Clock, Counting, Leaver, by_seed, tiny_masac, tiny_wqmix
from wqmix_jax.algos.base import Context, hyperparams
from wqmix_jax.config import load_group
from wqmix_jax.envs.base import External
from wqmix_jax.envs.predator_prey import PredatorPrey
from wqmix_jax.options import build, options
from wqmix_jax.training import rollout as rollout_module
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.rollout import block_length, rollout

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
    return jax.jit(replay.decode, static_argnums=1)(rows, env.spec.episode_limit)


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
    played = jax.jit(functools.partial(rollout, CLOCK, algo, num_envs=4))
    together = played(params, each(hp, 3), each(ctx, 3), keys)
    alone = played(by_seed(jax.tree.map(lambda leaf: leaf[1], params)), each(hp, 1), each(ctx, 1), keys[1:2])
    for many, one in zip(jax.tree.leaves(together.episodes), jax.tree.leaves(alone.episodes), strict=True):
        np.testing.assert_array_equal(many[1], one[0])


SMALL_HUNT = {"world_shape": [4, 4], "num_agents": 2, "num_stags": 1, "num_hares": 1, "obs_radius": 1}


def small_hunt(episode_limit: int = 7, kind: type[PredatorPrey] = PredatorPrey) -> PredatorPrey:
    values = load_group("env", "predator_prey") | SMALL_HUNT | {"episode_limit": episode_limit}
    values = {name: value for name, value in values.items() if name != "_target_"}
    return kind(**values | {"world_shape": tuple(values["world_shape"])})


def same(one: Any, other: Any) -> None:
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("to_the_end", [False, True], ids=["cpu", "accelerator"])
def test_the_length_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch, to_the_end: bool) -> None:
    """Also not where it doesn't divide the time limit, and where a block is played to its end."""
    if to_the_end:
        monkeypatch.setattr(rollout_module, "_is_worth_playing", lambda done: jnp.bool_(True))
    played = []
    for block in (1, 3, 7):
        monkeypatch.setattr(rollout_module, "block_length", lambda env, block=block: block)
        played.append([play(env, tiny_wqmix(), num_envs=8, epsilon=0.7)[1] for env in (CLOCK, small_hunt())])
    same(played[0], played[1])
    same(played[0], played[2])
    assert len(np.unique(played[0][0].episodes.length)) > 1


@pytest.mark.parametrize(("limit", "block"), [(200, 20), (30, 15), (150, 15), (101, 17), (20, 20), (7, 7), (1, 1)])
def test_a_block_divides_the_limit_or_hardly_exceeds_it(limit: int, block: int) -> None:
    assert block_length(Clock(episode_limit=limit, ends_from=0)) == block


def test_a_simulator_outside_of_jax_is_never_asked_for_a_step_too_many() -> None:
    class Outside(Clock):
        @property
        def external(self) -> External:
            return type("Simulators", (External,), {})()

    assert block_length(Outside(episode_limit=200, ends_from=0)) == 1


@options
class Lottery(Clock):
    """Pays a number that is drawn with the step's key."""

    def step(self, env_state: Any, joint_action: Any, key: Any) -> Any:
        env_state, outcome = super().step(env_state, joint_action, key)
        return env_state, outcome._replace(reward=jax.random.uniform(key))


def test_by_default_a_step_gets_its_key() -> None:
    _, played = play(Lottery(episode_limit=5, ends_from=9), tiny_wqmix(), num_envs=2)
    env_key = jax.random.split(jax.random.split(jax.random.key(1), 1)[0], 3)[2]
    expected = [
        [jax.random.uniform(jax.random.fold_in(key, step)) for step in range(5)] for key in jax.random.split(env_key, 2)
    ]
    np.testing.assert_array_equal(played.episodes.reward[0], np.array(expected))


@options
class Generous(PredatorPrey):
    """Overrides `step` alone, which has a key."""

    def step(self, env_state: Any, joint_action: Any, key: Any) -> Any:
        env_state, outcome = super().step(env_state, joint_action, key)
        return env_state, outcome._replace(reward=1.0 + jax.random.uniform(key))


@options
class Strict(PredatorPrey):
    """Overrides `transition` alone."""

    def transition(self, env_state: Any, joint_action: Any, noise: Any) -> Any:
        env_state, outcome = super().transition(env_state, joint_action, noise)
        return env_state, outcome._replace(reward=jnp.float32(-7))


def test_an_environment_is_played_by_what_its_class_defines_last() -> None:
    reward = [play(small_hunt(kind=kind), tiny_wqmix())[1].episodes.reward for kind in (Generous, Strict)]
    assert ((reward[0] >= 1) & (reward[0] < 2)).all()
    assert (reward[1] == -7).all()


def test_an_algorithm_acts_by_what_its_class_defines_last() -> None:
    @options
    class Last(type(tiny_wqmix())):
        def act(self, params: Any, carry: Any, inputs: Any, hp: Any, ctx: Any, key: Any) -> Any:
            joint_action, carry = super().act(params, carry, inputs, hp, ctx, key)
            return jnp.full_like(joint_action, 2), carry

    base = tiny_wqmix()
    algo = Last(**{field.name: getattr(base, field.name) for field in dataclasses.fields(base)})
    _, played = play(Clock(episode_limit=5, ends_from=9), algo, epsilon=1.0)
    assert (played.episodes.joint_action == 2).all()


def inner_body(env: Any) -> set[str]:
    """Returns the names of all primitives in the loop over the steps of a block."""
    algo = tiny_wqmix()

    def program() -> Any:
        params = jax.vmap(lambda key: algo.init(key, env.spec))(jax.random.split(jax.random.key(0), 1))
        ctx = by_seed(Context(jnp.float32(1), jnp.int32(0), jnp.int32(0)))
        return rollout(
            env, algo, params, by_seed(hyperparams(algo)), ctx, jax.random.split(jax.random.key(1), 1), num_envs=2
        )

    blocks = [eqn for eqn in jax.make_jaxpr(program)().eqns if eqn.primitive.name == "while"]
    [steps] = [eqn for eqn in blocks[-1].params["body_jaxpr"].eqns if eqn.primitive.name == "while"]
    return set(primitives(steps.params["body_jaxpr"]))


def primitives(jaxpr: Any) -> Any:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def is_draw(name: str) -> bool:
    return name.startswith(("random_", "threefry"))


def test_nothing_is_drawn_inside_of_a_block() -> None:
    assert not [name for name in inner_body(small_hunt()) if is_draw(name)]
    assert [name for name in inner_body(Lottery(episode_limit=5, ends_from=9)) if is_draw(name)]  # or nothing is seen
