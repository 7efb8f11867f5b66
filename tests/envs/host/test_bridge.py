"""A bridged run gives the numbers of a native one, with one call per step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import Counting, tiny_run, tiny_wqmix
from tests.envs.host.linear import linear
from tests.envs.host.native import Native
from tests.envs.host.running import toy
from wqmix_jax.algos.base import Algorithm
from wqmix_jax.envs.base import Environment
from wqmix_jax.trainer import make_trainer

CHUNKS, EVAL_EPISODES = 3, 3


def run(env: Environment, algo: Algorithm, seeds: list[int], **changes: Any) -> tuple[Any, list[Any]]:
    """The last state and all records of a run that is evaluated before each of its chunks."""
    config = tiny_run(
        algo, env, num_envs=2, eval_episodes=EVAL_EPISODES, chunk_iterations=2, eval_interval=20, **changes
    )
    trainer, records = make_trainer(config, sharding=env.host.sharding()), []
    with env.host.running(seeds):
        state = trainer.init(seeds)
        for _ in range(CHUNKS):
            evaluated = trainer.evaluate(state)
            state, record = trainer.train_chunk(state)  # donates the state before
            records.append(jax.device_get((evaluated, record)))
        keys = jax.tree.map(jax.random.key_data, state.keys)
        return jax.device_get(state._replace(keys=keys)), records


def same(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seeds", [[3], [3, 4, 5]])
def test_a_bridged_run_is_the_native_one_bit_for_bit(seeds: list[int]) -> None:
    bridged, native = toy(), Native(episode_limit=5, eval_envs=2)
    ours, theirs = run(bridged, linear(), seeds), run(native, linear(), seeds)
    same(ours, theirs)
    assert_one_call_per_step(bridged, ours)
    (evaluated, record), *_ = ours[1]
    assert len(np.unique(record.episode_length)) > 1
    assert (evaluated.metrics["hits"] > 0).any()
    assert (record.losses["loss"] > 0).any()


@pytest.mark.slow  # 35 s to compile the bridged loop alone, which no cache keeps
def test_an_algorithm_of_the_paper_is_the_native_one_bit_for_bit() -> None:
    same(run(toy(), tiny_wqmix(), [3, 4]), run(Native(episode_limit=5, eval_envs=2), tiny_wqmix(), [3, 4]))


def assert_one_call_per_step(env: Any, played: Any) -> None:
    """As many calls as the longest episode of each rollout has steps, and one reset each."""
    state, records = played
    calls = env.host.supervisor.calls
    assert calls["training", "reset"] == 2 * CHUNKS
    assert calls["evaluation", "reset"] == 2 * CHUNKS  # three episodes in two turns
    num_seeds = len(state.counters.episodes)
    stored = state.replay.experience.shape
    assert stored[0] == num_seeds
    assert 2 * CHUNKS <= calls["training", "step"] <= 2 * CHUNKS * env.spec.episode_limit


def test_calls_come_once_a_step_and_in_order() -> None:
    """Inside of `scan`, `while_loop` and `cond`, for the whole batch."""
    env = toy(episode_limit=1000)
    supervisor, seen = env.host.supervisor, []
    step = supervisor.step

    def noted(role: str, idle: Any, joint_action: Any) -> Any:
        seen.append(np.array(joint_action)[0, 0])
        return step(role, np.ones_like(idle), joint_action)

    supervisor.step = noted  # type: ignore[method-assign]

    def program(keys: Any) -> Any:
        start = env.reset_batch(keys)

        def play(state: Any, index: Any) -> Any:
            return env.step_batch(state, jnp.full((3, 2), index), keys)[0]

        def branch(state: Any, index: Any) -> Any:
            return jax.lax.cond(index % 2 == 0, play, lambda state, _: state, state, index), None

        scanned, _ = jax.lax.scan(branch, start, jnp.arange(6))
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, play(c[1], c[0])), (6, scanned))

    with env.host.running([0]):
        jax.block_until_ready(jax.jit(program)(jax.random.split(jax.random.key(0), 3)))
    assert [int(action) for action in seen] == [0, 2, 4, 6, 7, 8]
    assert supervisor.calls["training", "reset"] == 1
