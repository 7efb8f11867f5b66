"""The host loop between compiled chunks: it evaluates, and turns records into the lines of ``metrics.jsonl``.

`begin` and `advance` are the whole mechanism, for the command line and for `wqmix_jax.train_seeds` alike. Lines are
means over the iterations of a whole evaluation interval, so chunk sizes never change them.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from wqmix_jax.algos.base import Hyperparams
from wqmix_jax.training.compiled_loop import Counters, EvalRecord, Trainer, TrainRecord, TrainState
from wqmix_jax.training.members import Member

Line = dict[str, Any]
"""One record of one seed; `wqmix_jax.records.metrics` documents the keys."""


_FIRST = ("episode_return", "episode_length")


AIMED_SECONDS = 7.0
"""Aimed duration of a chunk: a signal waits for its end, and on a CPU shorter chunks make poorer use of the caches."""


class Loop(NamedTuple):
    """The state of a run between two chunks.

    Attributes:
        state: the train state; the next `advance` donates its buffers.
        members: the trainings, in the order of the state's leading axis ``S``.
        pending: the chunks since the last evaluation, numpy leaves ``[K, S]``.
        evaluated_at: ``[S]`` environment steps at the last evaluation.
        seconds: wall-clock seconds of training since then.
        iteration_seconds: seconds per iteration of the last chunk; None where the next one may take longer: at the
            start of a process, and when learning begins.
        before_evaluation: the same state with its evaluation still due, if one was just made.
    """

    state: TrainState
    members: tuple[Member, ...]
    pending: tuple[TrainRecord, ...]
    evaluated_at: np.ndarray
    seconds: float
    iteration_seconds: float | None = None
    before_evaluation: "Loop | None" = None


def begin(
    trainer: Trainer, members: Sequence[Member], *, prepare: Callable[[TrainState], TrainState] | None = None
) -> tuple[Loop, list[Line]]:
    """Draws the first state, and evaluates it before any learning.

    Args:
        trainer: the compiled functions.
        members: the trainings.
        prepare: changes the first state before it is evaluated; its shapes must stay.

    Returns:
        The run at its start, and an eval line per member.
    """
    state = trainer.init([member.seed for member in members])
    state = state._replace(hp=_with_swept(state.hp, members, trainer.sharding))
    state = state if prepare is None else prepare(state)
    evaluated = jax.device_get(trainer.evaluate(state))
    lines = [_eval_line(member, evaluated, index) for index, member in enumerate(members)]
    return Loop(state, tuple(members), (), np.array(evaluated.counters.env_steps), seconds=0.0), lines


def _with_swept(hp: Hyperparams, members: Sequence[Member], sharding: Sharding) -> Hyperparams:
    """Replaces swept options (leaves ``[S]``) by each member's own values."""
    swept = [dict(member.swept) for member in members]
    values = {name: np.array([options[name] for options in swept], getattr(hp, name).dtype) for name in swept[0]}
    return hp._replace(**{name: jax.device_put(value, sharding) for name, value in values.items()})


def advance(trainer: Trainer, loop: Loop) -> tuple[Loop, list[Line]]:
    """Trains for one chunk; at the end of an evaluation interval, and of the run, it evaluates too.

    An evaluation that failed when the run was interrupted is repeated, without training. A chunk
    takes about `AIMED_SECONDS`, or one iteration where that is longer.

    Returns:
        The new loop state, and the new records: none unless an evaluation was made; otherwise one train and one eval
        record for each member that trained. A member that failed gets no eval record.
    """
    if not _evaluation_is_due(trainer, loop):
        loop = _train_chunk(trainer, loop)
    if not _evaluation_is_due(trainer, loop):
        return loop, []
    # Lines are made here alone, of whole intervals, so that their numbers don't depend on the sizes of chunks.
    interval, evaluated = join(loop.pending), jax.device_get(trainer.evaluate(loop.state))
    if trainer.failure() is not None:  # an evaluation that didn't take place
        return loop, []
    trained = np.flatnonzero(interval.active.any(0)).tolist()
    lines = [_train_line(loop, interval, index) for index in trained]
    lines += [_eval_line(loop.members[index], evaluated, index) for index in trained if not failed(loop)[index]]
    return loop._replace(pending=(), evaluated_at=env_steps(loop), seconds=0.0, before_evaluation=loop), lines


def _train_chunk(trainer: Trainer, loop: Loop) -> Loop:
    started = time.perf_counter()
    iterations, iterations_until_learning = _next_iterations(trainer, loop)
    state, record = trainer.train(loop.state, np.int32(iterations))
    record = jax.device_get(record)
    # After a failure of the environment nothing was played; what is pending decides when the next evaluation is due.
    played = iterations if trainer.failure() is None else int(record.active.any(1).sum())
    chunk = jax.tree.map(lambda leaf: leaf[:played], record)
    seconds = time.perf_counter() - started
    return loop._replace(
        state=state,
        pending=(*loop.pending, chunk),
        seconds=loop.seconds + seconds,
        iteration_seconds=None if iterations == iterations_until_learning else seconds / iterations,
        before_evaluation=None,
    )


def _evaluation_is_due(trainer: Trainer, loop: Loop) -> bool:
    """Returns True if a whole evaluation interval is pending, or the last iterations of the run."""
    return bool(loop.pending) and (num_pending(loop) >= trainer.eval_iterations or is_finished(loop))


def _next_iterations(trainer: Trainer, loop: Loop) -> tuple[int, int]:
    """Counts the iterations of the next chunk, and those left before the first that learns (0: it has learned).

    A chunk ends where an evaluation is due, and before the first learner step: iterations take much longer from there.
    """
    missing = trainer.batch_size - int(np.array(loop.state.counters.episodes).max())
    until_learning = max(0, math.ceil(missing / trainer.num_envs) - 1)
    most = min(trainer.chunk_iterations, trainer.eval_iterations - num_pending(loop), until_learning or sys.maxsize)
    aimed = 1 if loop.iteration_seconds is None else int(AIMED_SECONDS / max(loop.iteration_seconds, 1e-6))
    return max(1, min(most, aimed)), until_learning


def env_steps(loop: Loop) -> np.ndarray:
    """Returns the environment steps of each seed so far, ``[S]``."""
    return np.array(loop.state.counters.env_steps)


def failed(loop: Loop) -> np.ndarray:
    """Returns True for members that are frozen because a number was not finite, bool ``[S]``."""
    return np.array(loop.state.failed)


def failures(loop: Loop) -> list[Line]:
    """Returns the labels of each failed member, and its counters after the iteration in which it failed."""
    return [
        {**loop.members[index].labels, **_counts(jax.tree.map(lambda leaf, at=index: leaf[at], loop.state.counters))}
        for index in np.flatnonzero(failed(loop))
    ]


def sound_steps(loop: Loop) -> np.ndarray:
    """Returns the environment steps of the members that have not failed; if all have, the largest number."""
    steps, out = env_steps(loop), failed(loop)
    return steps.max(keepdims=True) if out.all() else steps[~out]


def slowest_steps(loop: Loop) -> int:
    """Returns the least of `sound_steps`."""
    return int(sound_steps(loop).min())


def is_finished(loop: Loop) -> bool:
    """Returns True if every member has reached its total or has failed."""
    return bool(((env_steps(loop) >= np.array(loop.state.total_env_steps)) | failed(loop)).all())


def num_pending(loop: Loop) -> int:
    """Counts the iterations since the last evaluation."""
    return sum(len(chunk.active) for chunk in loop.pending)


def join(chunks: Sequence[TrainRecord]) -> TrainRecord:
    """Concatenates the iterations of several chunks, leaves ``[K, S]``."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)


def _eval_line(member: Member, record: EvalRecord, index: int) -> Line:
    # Return and length come first in every line, whatever else an environment measures.
    counters, metrics = jax.tree.map(lambda leaf: leaf[index], (record.counters, record.metrics))
    names = [*_FIRST, *(name for name in metrics if name not in _FIRST)]
    return {"kind": "eval", **member.labels, **_counts(counters), **{name: _exact(metrics[name]) for name in names}}


def _train_line(loop: Loop, interval: TrainRecord, index: int) -> Line:
    """Averages over the iterations in which a member trained; losses over those with learner steps."""
    seed: TrainRecord = jax.tree.map(lambda leaf: leaf[:, index], interval)
    last = jax.tree.map(lambda leaf: leaf[-1], seed.counters)
    active, learned = seed.active, seed.active & (seed.updates > 0)
    return {
        "kind": "train",
        **loop.members[index].labels,
        **_counts(last),
        "episode_return": _mean_of_whole(seed.episode_return[active]),
        "episode_length": _mean_of_whole(seed.episode_length[active]),
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


def _mean_of_whole(values: Any) -> float:
    """Returns the mean over the iterations that had a whole episode; nan if none had."""
    whole = values[~np.isnan(values)]
    return _mean(whole) if whole.size else math.nan


def _exact(value: Any) -> float:
    """Returns the shortest decimal that gives the same float32 again."""
    return float(str(np.float32(value)))
