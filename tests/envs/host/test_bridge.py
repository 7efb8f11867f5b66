"""A bridged run gives the numbers of a native one, with one call per step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import by_seed, tiny_run, tiny_wqmix
from tests.envs.host.linear import linear
from tests.envs.host.native import Native
from tests.envs.host.running import toy
from wqmix_jax.algos.base import Algorithm, Context, hyperparams
from wqmix_jax.envs.base import Environment
from wqmix_jax.training.compiled_loop import make_trainer
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.rollout import greedy_episodes, mean_metrics

CHUNKS, EVAL_EPISODES = 3, 3


def run(env: Environment, algo: Algorithm, seeds: list[int], **changes: Any) -> tuple[Any, list[Any]]:
    """Returns the last state and all records of a run that is evaluated before each of its chunks."""
    config = tiny_run(
        algo, env, num_envs=2, eval_episodes=EVAL_EPISODES, chunk_iterations=2, eval_interval=20, **changes
    )
    trainer, records = make_trainer(config, sharding=env.external.sharding()), []
    with env.external.running(seeds):
        state = trainer.init(seeds)
        for _ in range(CHUNKS):
            evaluated = trainer.evaluate(state)
            state, record = trainer.train_chunk(state)  # donates the previous state
            records.append(jax.device_get((evaluated, record)))
        keys = jax.tree.map(jax.random.key_data, state.keys)
        return jax.device_get(state._replace(keys=keys)), records


def same(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seeds", [pytest.param([3], marks=pytest.mark.slow), [3, 4, 5]])
def test_a_bridged_run_is_the_native_one_bit_for_bit(seeds: list[int]) -> None:
    bridged, native = toy(), Native(episode_limit=5, eval_envs=2)
    algo = linear(buffer_size=4 * CHUNKS)
    ours, theirs = run(bridged, algo, seeds), run(native, algo, seeds)
    same(ours, theirs)
    replay = make_replay(native, buffer_size=algo.buffer_size, batch_size=algo.batch_size)
    lengths = jax.vmap(replay.lengths)(ours[0].replay.experience[:, 0]).reshape(len(seeds), -1, 2)
    assert bridged.external.supervisor.calls["training", "step"] == lengths.max((0, 2)).sum()
    assert bridged.external.supervisor.calls["training", "reset"] == lengths.shape[1] == 2 * CHUNKS
    (evaluated, record), *_ = ours[1]
    assert len(np.unique(record.episode_length)) > 1
    assert (evaluated.metrics["hits"] > 0).any()
    assert (record.losses["loss"] > 0).any()


@pytest.mark.slow  # 35 s to compile the bridged loop alone, which no cache keeps
def test_an_algorithm_of_the_paper_is_the_native_one_bit_for_bit() -> None:
    same(run(toy(), tiny_wqmix(), [3, 4]), run(Native(episode_limit=5, eval_envs=2), tiny_wqmix(), [3, 4]))


def greedy(env: Environment, num_episodes: int) -> dict[str, Any]:
    """Returns the figures of an evaluation of one seed."""
    algo, keys = linear(), jax.random.split(jax.random.key(5), 1)
    params = jax.vmap(lambda key: algo.init(key, env.spec))(keys)
    hp, ctx = by_seed((hyperparams(algo), Context(jnp.float32(0), jnp.int32(0), jnp.int32(0))))
    play = functools.partial(greedy_episodes, env, algo, num_episodes=num_episodes)
    return jax.jit(lambda: mean_metrics(play(params, hp, ctx, keys)))()


def test_evaluation_plays_in_turns_on_few_games_of_its_own() -> None:
    env = toy(workers={"eval_envs": 1})
    with env.external.running([7]):
        found = jax.device_get(greedy(env, 3))
        assert len(env.external.supervisor.pids("evaluation")) == 1
        assert env.external.supervisor.pids("training") == []
    assert env.external.supervisor.calls == {
        ("evaluation", "reset"): 3,
        ("evaluation", "step"): round(3 * found["episode_length"].item()),
    }
    same(found, greedy(Native(episode_limit=5, eval_envs=1), 3))


@pytest.mark.parametrize(("num_episodes", "at_once"), [(32, 8), (8, 8), (3, 3), (9, 5), (1, 1), (31, 8)])
def test_turns_are_as_few_and_as_even_as_can_be(num_episodes: int, at_once: int) -> None:
    assert toy(workers={"eval_envs": 8}).episodes_at_once(num_episodes) == at_once


def test_evaluation_never_changes_the_games_of_training() -> None:
    """Not even with a simulator that draws from separate generators, as StarCraft II does."""

    def train_twice(num_episodes: int) -> Any:
        env = toy(forgets_seeds=True)
        keys = jax.random.split(jax.random.key(1), 2)
        with env.external.running([0, 1]):
            first = jax.device_get(env.reset_batch(keys))
            if num_episodes:
                greedy(env, num_episodes)
            return first, jax.device_get(env.reset_batch(keys))

    first, second = train_twice(0)
    assert (first.seen.state != second.seen.state).any()
    same((first, second), train_twice(2))


def test_calls_come_once_a_step_and_in_order() -> None:
    """Inside of `scan`, `while_loop` and `cond`, for the whole batch."""
    env = toy(episode_limit=1000)
    supervisor, seen = env.external.supervisor, []
    step = supervisor.step

    def noted(role: str, joint_action: Any) -> Any:
        seen.append(np.array(joint_action)[0, 0])
        return step(role, np.full_like(joint_action, -1))

    supervisor.step = noted  # type: ignore[method-assign]

    def program(keys: Any) -> Any:
        start = env.reset_batch(keys)

        def play(state: Any, index: Any) -> Any:
            return env.step_batch(state, jnp.full((3, 2), index), keys)[0]

        def branch(state: Any, index: Any) -> Any:
            return jax.lax.cond(index % 2 == 0, play, lambda state, _: state, state, index), None

        scanned, _ = jax.lax.scan(branch, start, jnp.arange(6))
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, play(c[1], c[0])), (6, scanned))

    with env.external.running([0]):
        jax.block_until_ready(jax.jit(program)(jax.random.split(jax.random.key(0), 3)))
    assert [int(action) for action in seen] == [0, 2, 4, 6, 7, 8]
    assert supervisor.calls["training", "reset"] == 1
