"""The host loop between compiled chunks: it evaluates, and turns records into the lines of ``metrics.jsonl``.

`begin` and `advance` are the whole mechanism, for the command line and for `wqmix_jax.train_seeds` alike. Numbers are
taken over the iterations of a whole evaluation interval, so chunk sizes never change them.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.trainer import Counters, EvalRecord, Trainer, TrainRecord, TrainState

Line = dict[str, Any]
"""One record of one seed; `wqmix_jax.logger` documents the keys."""


_FIRST = ("episode_return", "episode_length")


class Loop(NamedTuple):
    """Where a run stands between two chunks.

    Attributes:
        state: the train state; the next `advance` donates its buffers.
        seeds: the seeds, in the order of the state's leading axis ``S``.
        pending: the chunks since the last evaluation, numpy leaves ``[K, S]``.
        evaluated_at: ``[S]`` environment steps at the last evaluation.
        seconds: wall-clock seconds of training since then.
    """

    state: TrainState
    seeds: tuple[int, ...]
    pending: tuple[TrainRecord, ...]
    evaluated_at: np.ndarray
    seconds: float


def compile_trainer(trainer: Trainer, seeds: Sequence[int], *, fresh: bool = True) -> tuple[Trainer, float]:
    """Compiles a trainer's functions ahead of their first call.

    Args:
        trainer: the trainer.
        seeds: as many as will train.
        fresh: whether `Trainer.init` is compiled too; a resumed run doesn't need it.

    Returns:
        The trainer with its functions compiled for this number of seeds, and the seconds that it took.
    """
    started = time.perf_counter()
    state = abstract_state(trainer, seeds)
    compiled = trainer._replace(
        train_chunk=jax.jit(trainer.train_chunk, donate_argnums=0).lower(state).compile(),
        evaluate=jax.jit(trainer.evaluate).lower(state).compile(),
    )
    if fresh:
        init = jax.jit(trainer.init).lower(_as_array(seeds)).compile()
        compiled = compiled._replace(init=lambda seeds: init(_as_array(seeds)))
    return compiled, time.perf_counter() - started


def _as_array(seeds: Sequence[int]) -> jax.Array:
    return jnp.asarray(seeds, jnp.uint32)


def abstract_state(trainer: Trainer, seeds: Sequence[int]) -> TrainState:
    """Shapes, dtypes and devices of the train state."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=trainer.sharding),
        jax.eval_shape(lambda: trainer.init(seeds)),
    )


def abstract_interval(trainer: Trainer, seeds: Sequence[int]) -> TrainRecord:
    """Shapes and dtypes of the iterations of one whole evaluation interval, leaves ``[eval_iterations, S]``."""
    _, record = jax.eval_shape(trainer.train_chunk, abstract_state(trainer, seeds))
    length = trainer.eval_iterations
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype), record)


def begin(trainer: Trainer, seeds: Sequence[int]) -> tuple[Loop, list[Line]]:
    """Draws the first state, and evaluates it before any learning.

    Returns:
        The run at its start, and an eval line per seed.
    """
    state = trainer.init(seeds)
    evaluated = _evaluate(trainer, state)
    lines = [_eval_line(seed, evaluated, index) for index, seed in enumerate(seeds)]
    return Loop(state, tuple(seeds), (), np.array(evaluated.counters.env_steps), seconds=0.0), lines


def advance(trainer: Trainer, loop: Loop) -> tuple[Loop, list[Line]]:
    """Trains for one chunk; at the end of an evaluation interval, and of the run, it evaluates too.

    Returns:
        The run after it, and at an evaluation a train and an eval line of each seed that trained since the one before.
    """
    started = time.perf_counter()
    state, record = trainer.train_chunk(loop.state)
    pending = (*loop.pending, jax.device_get(record))
    seconds = loop.seconds + time.perf_counter() - started
    loop = loop._replace(state=state, pending=pending, seconds=seconds)
    if num_pending(loop) < trainer.eval_iterations and not is_finished(loop):
        return loop, []
    interval, evaluated = join(loop.pending), _evaluate(trainer, state)
    if trainer.failure() is not None:  # an evaluation that didn't take place
        return loop, []
    trained = [index for index in range(len(loop.seeds)) if interval.active[:, index].any()]
    lines = [_train_line(loop, interval, index) for index in trained]
    lines += [_eval_line(loop.seeds[index], evaluated, index) for index in trained]
    return loop._replace(pending=(), evaluated_at=env_steps(loop), seconds=0.0), lines


def env_steps(loop: Loop) -> np.ndarray:
    """Environment steps of each seed so far, ``[S]``."""
    return np.array(loop.state.counters.env_steps)


def is_finished(loop: Loop) -> bool:
    """Whether the slowest seed has reached its total."""
    return bool((env_steps(loop) >= np.array(loop.state.total_env_steps)).all())


def num_pending(loop: Loop) -> int:
    """Iterations since the last evaluation."""
    return sum(len(chunk.active) for chunk in loop.pending)


def join(chunks: Sequence[TrainRecord]) -> TrainRecord:
    """The iterations of several chunks in a row, leaves ``[K, S]``."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)


def _evaluate(trainer: Trainer, state: TrainState) -> EvalRecord:
    return jax.device_get(trainer.evaluate(state))


def _eval_line(seed: int, record: EvalRecord, index: int) -> Line:
    counters, metrics = jax.tree.map(lambda leaf: leaf[index], (record.counters, record.metrics))
    names = [*_FIRST, *(name for name in metrics if name not in _FIRST)]
    return {"kind": "eval", "seed": seed, **_counts(counters), **{name: _exact(metrics[name]) for name in names}}


def _train_line(loop: Loop, interval: TrainRecord, index: int) -> Line:
    """One seed's means over the iterations in which it trained; of losses, over those with learner steps."""
    seed: TrainRecord = jax.tree.map(lambda leaf: leaf[:, index], interval)
    last = jax.tree.map(lambda leaf: leaf[-1], seed.counters)
    active, learned = seed.active, seed.active & (seed.updates > 0)
    return {
        "kind": "train",
        "seed": loop.seeds[index],
        **_counts(last),
        "episode_return": _mean(seed.episode_return[active]),
        "episode_length": _mean(seed.episode_length[active]),
        "epsilon": _mean(seed.epsilon[active]),
        **{name: _mean(values[learned]) for name, values in seed.losses.items() if learned.any()},
        "steps_per_second": float(f"{(last.env_steps - loop.evaluated_at[index]) / loop.seconds:.5g}"),
    }


def _counts(counters: Counters) -> dict[str, int]:
    return {
        "env_steps": int(counters.env_steps),
        "learner_steps": int(counters.learner_steps),
        "episodes": int(counters.episodes),
    }


def _mean(values: Any) -> float:
    return _exact(np.ascontiguousarray(values, np.float64).mean())


def _exact(value: Any) -> float:
    """The shortest decimal that gives the same float32 again."""
    return float(str(np.float32(value)))
