"""The host loop evaluates when it should and writes correct lines, on a trainer whose every record is known."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from wqmix_jax.training import host_loop as loop_module
from wqmix_jax.training.compiled_loop import Counters, EvalRecord, Trainer, TrainRecord
from wqmix_jax.training.host_loop import Line, Loop, advance, begin, env_steps, is_finished, num_pending
from wqmix_jax.training.members import Member

LENGTHS = {0: [3, 2, 3, 1, 3, 3, 2, 3], 1: [1, 1, 2, 1, 1, 2, 1, 1, 3, 1, 1, 1, 1, 1]}
"""The steps of each iteration's one episode, by seed."""

WARM_UP = 2
"""Iterations before the first learner step; from then on one in each."""


class Hyperparams(NamedTuple):
    """The option that a sweep can set."""

    alpha: np.ndarray


class State(NamedTuple):
    """The part of a train state that the loop looks at."""

    counters: Counters
    total_env_steps: np.ndarray
    failed: np.ndarray
    hp: Hyperparams


class Time:
    """The clock that the loop reads: each iteration takes ``playing`` seconds, and ``learning`` more if it learns.

    Attributes:
        chunks: how many iterations each call has run.
    """

    def __init__(self, playing: float = 0.5, learning: float = 0.0) -> None:
        self.now, self.playing, self.learning = 0.0, playing, learning
        self.chunks: list[int] = []

    def perf_counter(self) -> float:
        return self.now


def known_trainer(
    *, chunk_iterations: int, eval_iterations: int, total_env_steps: int, time: Time | None = None
) -> Trainer:
    """Plays `LENGTHS`; of episode e the return is e, the epsilon 1 / e and the loss e squared."""
    time = Time() if time is None else time
    loop_module.time = time  # type: ignore[assignment]

    def init(seeds: Any) -> Any:
        zero = np.zeros(len(seeds), np.int32)
        totals = np.full(len(seeds), total_env_steps, np.int32)
        return State(Counters(zero, zero, zero), totals, zero > 0, Hyperparams(np.zeros(len(seeds), np.float32)))

    def iteration(state: State) -> tuple[State, TrainRecord]:
        counters, active = state.counters, state.counters.env_steps < total_env_steps
        lengths = np.array([LENGTHS[index][counters.episodes[index]] for index in range(len(active))]) * active
        episodes = counters.episodes + active
        updates = (active & (episodes > WARM_UP)).astype(np.int32)
        number = (counters.episodes + 1).astype(np.float32)
        counters = Counters(counters.env_steps + lengths, episodes, counters.learner_steps + updates)
        losses = {"loss": np.where(updates > 0, number**2, np.float32(0))}
        record = TrainRecord(counters, active, updates, 1 / number, number, lengths.astype(np.float32), losses)
        return state._replace(counters=counters), record

    def train(state: Any, num_iterations: Any) -> tuple[Any, TrainRecord]:
        records = []
        time.chunks.append(int(num_iterations))
        for _ in range(num_iterations):
            state, record = iteration(state)
            time.now += time.playing + time.learning * bool(record.updates.any())
            records.append(record)
        stacked = [np.stack(leaves) for leaves in zip(*(record[1:6] for record in records), strict=True)]
        counters = Counters(*map(np.stack, zip(*(record.counters for record in records), strict=True)))
        losses = {"loss": np.stack([record.losses["loss"] for record in records])}
        return state, TrainRecord(counters, *stacked, losses)

    def evaluate(state: Any) -> EvalRecord:
        figures = state.counters.episodes.astype(np.float32)
        metrics = {"captures": figures / 10, "episode_length": figures + 1, "episode_return": figures * 2}
        return EvalRecord(state.counters, metrics)

    sharding = SingleDeviceSharding(jax.local_devices()[0])
    lengths = {"chunk_iterations": chunk_iterations, "eval_iterations": eval_iterations}
    when = {"batch_size": WARM_UP + 1, "num_envs": 1}
    return Trainer(init, train, evaluate, learn=NotImplemented, **lengths, **when, replay_bytes=0, sharding=sharding)


def run(trainer: Trainer) -> tuple[Loop, list[list[Line]]]:
    """The loop at its end, and the lines of each evaluation."""
    loop, lines = begin(trainer, [Member(5), Member(6)])
    batches = [lines]
    while not is_finished(loop):
        loop, lines = advance(trainer, loop)
        batches += [lines] if lines else []
    return loop, batches


@pytest.fixture(autouse=True)
def clock_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "time", Time())


def test_evaluations_come_before_learning_every_interval_and_at_the_end() -> None:
    loop, batches = run(known_trainer(chunk_iterations=2, eval_iterations=4, total_env_steps=12))
    seen = [[(line["kind"], line["seed"], line["env_steps"], line["episodes"]) for line in batch] for batch in batches]
    assert seen == [
        [("eval", 5, 0, 0), ("eval", 6, 0, 0)],
        [("train", 5, 9, 4), ("train", 6, 5, 4), ("eval", 5, 9, 4), ("eval", 6, 5, 4)],
        [("train", 5, 12, 5), ("train", 6, 10, 8), ("eval", 5, 12, 5), ("eval", 6, 10, 8)],  # seed 5 got there
        [("train", 6, 13, 9), ("eval", 6, 13, 9)],  # after one chunk of the interval's two: seed 6 did too
    ]
    assert env_steps(loop).tolist() == [12, 13]
    assert loop.pending == ()


def test_a_run_shorter_than_an_interval_is_evaluated_at_its_end() -> None:
    _, batches = run(known_trainer(chunk_iterations=1, eval_iterations=100, total_env_steps=2))
    assert [[line["kind"] for line in batch] for batch in batches] == [["eval"] * 2, ["train"] * 2 + ["eval"] * 2]


def test_train_lines_are_means_over_the_intervals_active_iterations() -> None:
    _, batches = run(known_trainer(chunk_iterations=2, eval_iterations=4, total_env_steps=12))
    first, second = batches[1][0], batches[2][0]
    assert first == {
        "kind": "train",
        "seed": 5,
        "env_steps": 9,
        "learner_steps": 2,
        "episodes": 4,
        "episode_return": 2.5,
        "episode_length": 2.25,
        "epsilon": pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4),
        "loss": 12.5,  # of the two iterations that learned
        "steps_per_second": 4.5,
    }
    # One active iteration, then the seed rests.
    assert (second["episode_return"], second["episode_length"], second["loss"]) == (5.0, 3.0, 25.0)
    assert second["steps_per_second"] == 1.5


def test_iterations_without_a_whole_episode_are_left_out_of_the_mean_return() -> None:
    """A failing environment cuts episodes; the trainer's record of an iteration that has no other is nan."""
    trainer = known_trainer(chunk_iterations=2, eval_iterations=4, total_env_steps=12)

    def cut(state: Any, num_iterations: Any) -> tuple[Any, TrainRecord]:
        state, record = trainer.train(state, num_iterations)
        number = np.where(record.episode_return == 2, np.nan, record.episode_return)
        return state, record._replace(episode_return=np.float32(number), episode_length=record.episode_length * np.nan)

    first = run(trainer._replace(train=cut))[1][1][0]
    assert first["episode_return"] == pytest.approx((1 + 3 + 4) / 3)
    assert math.isnan(first["episode_length"])
    assert first["env_steps"] == 9


def test_losses_are_left_out_before_the_first_learner_step() -> None:
    _, batches = run(known_trainer(chunk_iterations=1, eval_iterations=2, total_env_steps=12))
    assert "loss" not in batches[1][0]
    assert "loss" in batches[2][0]


def test_eval_lines_begin_with_what_everybody_reads() -> None:
    _, batches = run(known_trainer(chunk_iterations=2, eval_iterations=4, total_env_steps=12))
    assert list(batches[1][2].items()) == [
        ("kind", "eval"),
        ("seed", 5),
        ("env_steps", 9),
        ("learner_steps", 2),
        ("episodes", 4),
        ("episode_return", 8.0),
        ("episode_length", 5.0),
        ("captures", 0.4),
    ]


@pytest.mark.parametrize("chunk_iterations", [1, 2, 4])
def test_chunk_sizes_never_change_a_line(chunk_iterations: int) -> None:
    def lines(chunk_iterations: int) -> list[list[Line]]:
        trainer = known_trainer(chunk_iterations=chunk_iterations, eval_iterations=4, total_env_steps=12)
        return [[line | {"steps_per_second": 0} for line in batch] for batch in run(trainer)[1]]

    assert lines(chunk_iterations) == lines(4)


@pytest.mark.parametrize(
    ("learning", "chunks"),
    [
        (0.0, [1, 1, 1, 5, 8]),
        (2.5, [1, 1, 1, 2, 2, 1, 2]),  # three seconds each, seven are aimed at
        (50.0, [1] * 9),
    ],
)
def test_chunks_start_with_one_iteration_and_take_a_few_seconds(learning: float, chunks: list[int]) -> None:
    """A signal waits for a chunk, so also the first that learns, which takes longer than those before, is short.

    Learning begins with the third iteration, and after the eighth an evaluation is due.
    """
    time = Time(learning=learning)
    run(known_trainer(chunk_iterations=8, eval_iterations=8, total_env_steps=12, time=time))
    assert time.chunks == chunks


@pytest.mark.parametrize(
    ("num_envs", "stored", "expected"),
    [
        (1, 0, (9, 9)),
        (1, 8, (1, 1)),
        (1, 9, (10, 0)),
        (4, 0, (2, 2)),
        (4, 4, (1, 1)),
        (4, 8, (10, 0)),
        (16, 0, (10, 0)),
    ],
)
def test_a_chunk_ends_before_the_first_iteration_that_learns(
    num_envs: int, stored: int, expected: tuple[int, int]
) -> None:
    """The first iteration that learns stores the tenth episode."""
    trainer = known_trainer(chunk_iterations=10, eval_iterations=10, total_env_steps=1000)
    loop, _ = begin(trainer, [Member(5), Member(6)])
    counters = loop.state.counters._replace(episodes=np.full(2, stored, np.int32))
    loop = loop._replace(state=loop.state._replace(counters=counters), iteration_seconds=0.1)
    assert loop_module._next_iterations(trainer._replace(batch_size=10, num_envs=num_envs), loop) == expected


def test_iterations_that_a_failure_of_the_environment_left_out_are_not_pending() -> None:
    """Otherwise a resumed run would make its next evaluation, which is due after so many iterations, too early."""
    trainer = known_trainer(chunk_iterations=4, eval_iterations=8, total_env_steps=12, time=Time(playing=0.001))
    calls: list[int] = []

    def cut(state: Any, num_iterations: Any) -> tuple[Any, TrainRecord]:
        calls.append(int(num_iterations))
        state, record = trainer.train(state, num_iterations)
        active = record.active & (np.arange(len(record.active)) < 1)[:, None]  # the first iteration alone was played
        return state, record._replace(active=active)

    broken = trainer._replace(train=cut, failure=lambda: RuntimeError("no worker is left") if 4 in calls else None)
    loop, _ = begin(broken, [Member(5), Member(6)])
    while 4 not in calls:
        before = num_pending(loop)
        loop, lines = advance(broken, loop)
    assert (num_pending(loop) - before, lines) == (1, [])
