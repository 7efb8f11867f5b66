"""Operations in sequence of small functions, counted by hand, and limits for the programs of a run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.operations import Loop, Operations, count_sequential, sequential_loops
from wqmix_jax import load_config, make_trainer
from wqmix_jax.training.compiled_loop import Trainer, TrainState, abstract_state
from wqmix_jax.training.members import make_members

LEARNER_CALL = {
    "qmix": Operations(total=31_900, dots=955, draws_in_loops=11, long_loops=0),
    "ow_qmix": Operations(total=32_700, dots=980, draws_in_loops=11, long_loops=0),
}
"""Limits for one learner call on whole episodes, as accelerators make it: 10% above the numbers."""

ENV_STEP = Operations(total=2_130, dots=4, draws_in_loops=0, long_loops=0)
"""Limits for one step of the loop that plays: acting and the environment."""

SHORT = 8
"""Loops with at most as many trips cost little."""


@functools.cache
def traced(algo: str, platform: str = "tpu") -> tuple[Trainer, TrainState]:
    config = load_config(f"+algo={algo}")
    trainer = make_trainer(config, platform=platform)
    return trainer, abstract_state(trainer, make_members(config.algo, config.seeds, {}))


@pytest.mark.parametrize("algo", LEARNER_CALL)
def test_the_operations_of_a_learner_call_stay_below_their_limits(algo: str) -> None:
    trainer, state = traced(algo)
    counts = count_sequential(trainer.learn, state)
    assert above(counts, LEARNER_CALL[algo]) == {}


TIME_LOOPS = {
    "tpu": [(None, 1, 3), (12, 1, 1), (None, 1, 10), (12, 1, 1), (12, 1, 1)],
    "gpu": [(None, 1, 3), (29, 29, 1), (None, 1, 10), (29, 29, 1)],
}
"""The loops over the blocks of the 201 places of predator-prey's episodes and over the steps of a block, forward and
backward: the number of trips, how many of them are straight-line code, and the matrix products of each. On a TPU, the
backward pass recomputes hidden states."""


@pytest.mark.parametrize("algo", LEARNER_CALL)
@pytest.mark.parametrize("platform", TIME_LOOPS)
def test_a_step_in_time_takes_one_product_for_all_nets(algo: str, platform: str) -> None:
    """All other loops are short, except two: over the updates of an iteration, and of one turn or none to copy."""
    trainer, state = traced(algo, platform)
    loops = [loop for loop in sequential_loops(trainer.learn, state) if loop.trips is None or loop.trips > SHORT]
    updates, *over_time, target_copies = loops
    assert updates.trips is None
    assert [(loop.trips, loop.inline, loop.dots) for loop in over_time] == TIME_LOOPS[platform]
    assert (target_copies.trips, target_copies.dots) == (None, 0)


def test_the_operations_of_an_environment_step_stay_below_their_limits() -> None:
    trainer, state = traced("qmix")
    _, step = (loop.once for loop in sequential_loops(trainer.evaluate, state) if loop.trips is None)
    assert step.dots > 0
    assert above(step, ENV_STEP) == {}


def above(counts: Operations, limits: Operations) -> dict[str, tuple[int, int]]:
    """Returns the counts that exceed their limits, by name."""
    both = zip(counts._fields, counts, limits, strict=True)
    return {name: (count, limit) for name, count, limit in both if count > limit}


def test_operations_in_loops_are_counted_as_often_as_they_run() -> None:
    x = jnp.ones((3, 3))

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(x @ x), None

    assert count_sequential(jnp.matmul, x, x) == Operations(1, 1, 0, 0)
    assert count_sequential(lambda x: jax.lax.scan(step, x, None, length=7), x) == Operations(14, 7, 0, 0)
    assert count_sequential(lambda x: jax.lax.scan(step, x, None, length=101), x) == Operations(202, 101, 0, 1)


def test_loops_are_found_with_their_own_products() -> None:
    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.jit(jnp.matmul)(x, x), None

    def outer(x: jax.Array) -> jax.Array:
        return jax.lax.scan(inner, x @ x @ x, None, length=7, unroll=3)[0]

    def choose(x: jax.Array) -> jax.Array:
        return jax.lax.cond(True, lambda x: jax.lax.while_loop(lambda x: x.sum() < 9.0, outer, x), lambda x: x, x)

    assert sequential_loops(choose, jnp.ones((3, 3))) == [
        Loop(None, 1, 2, Operations(total=2 + 7 + 2, dots=2 + 7)),  # its condition sums and compares
        Loop(7, 3, 1, Operations(total=1, dots=1)),
    ]


def test_loops_of_unknown_length_take_the_given_number_of_trips() -> None:
    def until(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x < 9.0, lambda x: x * 2.0 + 1.0, x)

    def named(x: jax.Array) -> jax.Array:
        with jax.named_scope("turns_at_most_4"):
            return until(x)

    assert [count_sequential(until, jnp.float32(1), unknown_trips=trips).total for trips in (1, 5)] == [3, 15]
    assert count_sequential(named, jnp.float32(1)).total == 12


def test_the_branch_with_the_most_operations_counts() -> None:
    def choose(x: jax.Array) -> jax.Array:
        return jax.lax.switch(jnp.int32(1), [jnp.sin, lambda x: (x @ x) @ x, lambda x: x], x)

    counts = count_sequential(choose, jnp.ones((3, 3)))
    assert (counts.dots, counts.total) == (2, 3 + 1)  # the index is clamped


def test_random_numbers_count_inside_of_loops_alone() -> None:
    def draw(key: jax.Array) -> jax.Array:
        return jax.lax.map(lambda i: jax.random.uniform(jax.random.fold_in(key, i)), jnp.arange(4))

    key = jax.random.key(0)
    assert count_sequential(jax.random.uniform, key).draws_in_loops == 0
    assert count_sequential(draw, key).draws_in_loops == 4 * 2
