"""Workers fail in every way: recorded steps stay true, and no process is left behind."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import tiny_run
from tests.envs.host.linear import linear
from tests.envs.host.native import Native
from tests.envs.host.running import await_gone, called, idle_where, launched, toy
from tests.envs.host.toy import Toy
from wqmix_jax.envs.host.supervisor import Supervisor
from wqmix_jax.errors import RunError
from wqmix_jax.training.compiled_loop import make_trainer
from wqmix_jax.training.replay import make_replay

ROOT = Path(__file__).parents[3]
ROWS, LIMIT = 4, 9
ACTION = {0: (1, 0), 1: (0, 0), 2: (0, 1)}
"""By ``x % 3``: what both may play there."""


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """Returns the folder in which workers note that they have misbehaved."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def launches(tmp_path: Path) -> Path:
    folder = tmp_path / "launches"
    folder.mkdir()
    return folder


def fault(kind: str, during: str, marks: Path, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "during": during, "marks": str(marks), **more}


def play(supervisor: Supervisor, seeds: Any, num_steps: int) -> list[tuple[np.ndarray, ...]]:
    """Plays one episode in each row and returns copies of the results of its calls."""
    calls = [called(supervisor, "reset", seeds)]
    ended = calls[0][-1].copy()
    for _ in range(num_steps):
        joint_action = [ACTION[int(x) % 3] for x in calls[-1][1][:, 0]]
        calls.append(called(supervisor, "step", idle_where(ended, joint_action)))
        ended |= calls[-1][5] | calls[-1][6] | calls[-1][7]
    return calls


def expected(seed: int, num_steps: int, episode_limit: int) -> list[tuple[Any, ...]]:
    """Returns one row of the same, played by a toy in this process."""
    toy = Toy(0, episode_limit)
    toy.reset(int(seed))
    calls, outcome = [], (0.0, False, False)
    for _ in range(num_steps + 1):
        calls.append((*toy.observe(), [toy.metrics()["hits"]], *outcome, False))
        outcome = outcome if any(outcome[1:]) else toy.step(list(ACTION[toy.x % 3]))
    return calls


def same_row(calls: list[tuple[np.ndarray, ...]], row: int, seed: int) -> None:
    for found, right in zip(calls, expected(seed, len(calls) - 1, LIMIT), strict=True):
        for one, other in zip(found, right, strict=True):
            np.testing.assert_array_equal(one[row], other)


@pytest.mark.parametrize(
    ("kind", "during", "cause"),
    [
        ("kill", "step", "worker killed by signal 9 in a step"),
        ("kill", "reset", "worker killed by signal 9 in a reset"),
        ("kill", "launch", "worker killed by signal 9 in a reset"),
        ("leave", "step", r"worker ended with exit code 3 \(the simulator's last words\) in a step"),
        ("fail", "step", r"ValueError: the toy broke \(toy.py:\d+\) in a step"),
        ("fail", "reset", r"ValueError: the toy broke \(toy.py:\d+\) in a reset"),
        ("hang", "step", "hung for 0.5 s in a step"),
        ("hang_deaf", "step", "hung for 0.5 s in a step"),
        (
            "idle",
            "step",
            r"ValueError: agent 1 has no available action after 2 steps of the episode \(worker.py:\d+\) in a step",
        ),
        ("shape", "step", r"ValueError: obs has shape \(2, 2\), but \(2, 3\) is needed \(worker.py:\d+\) in a step"),
    ],
)
def test_a_worker_that_fails_is_replaced(
    kind: str, during: str, cause: str, marks: Path, launches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"step_timeout": 0.5} if kind.startswith("hang") else {}
    faults = [fault(kind, during, marks)]
    env = toy(faults=faults, launches=str(launches), child=True, workers=limits, episode_limit=LIMIT)
    supervisor, seeds = env.external.supervisor, np.array([2, 3, 5, 6])
    with env.external.running([5, 6]):
        first, second = play(supervisor, seeds, 3), play(supervisor, seeds + 10, 3)
        assert supervisor.failure is None
        assert env.external.facts() == {"worker_restarts": 1}
    err = capsys.readouterr().err
    assert re.search(rf"^warning: seed [56], environment [01] of training: {cause}; the worker is replaced$", err, re.M)
    failed = np.stack([call[-1] for call in first])
    assert failed.sum() == (1 if during == "step" else 0)
    # The others never notice, nor does the replaced one in its next episode; a failed reset gave another episode.
    undisturbed = ~failed.any(0) if during == "step" else first[0][1][:, 0] == seeds
    assert undisturbed.sum() == ROWS - 1
    for row, seed in enumerate(seeds):
        same_row(second, row, seed + 10)
        if undisturbed[row]:
            same_row(first, row, seed)
    await_gone(launched(launches))


def test_many_fail_at_once_under_load(marks: Path, launches: Path) -> None:
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    faults = [fault(kind, during, marks) for kind in ("kill", "fail", "leave") for during in ("step", "reset")]
    env = toy(faults=faults, launches=str(launches), workers={"max_restarts": 6}, episode_limit=LIMIT)
    seeds = np.array([2, 3, 5, 6])
    try:
        with env.external.running([5, 6]):
            episodes = [play(env.external.supervisor, seeds + 10 * number, 3) for number in range(4)]
            assert env.external.facts() == {"worker_restarts": 6}
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert sum(call[-1].sum() for episode in episodes for call in episode) == 3
    for row, seed in enumerate(seeds):
        same_row(episodes[-1], row, seed + 30)
    await_gone(launched(launches))


def test_seeds_of_replaced_workers_are_new(marks: Path, launches: Path) -> None:
    env = toy(faults=[fault("kill", "step", marks, times=3)], launches=str(launches), episode_limit=LIMIT)
    with env.external.running([0]):
        for _ in range(2):
            play(env.external.supervisor, np.array([2, 3, 5, 6]), 3)
    seeds = [path.read_text() for path in launches.iterdir()]
    assert len(set(seeds)) == len(seeds) == ROWS + 3


def test_restarts_are_bounded_and_the_error_says_where_and_why(marks: Path, launches: Path) -> None:
    env = toy(faults=[fault("fail", "reset", marks, times=99)], launches=str(launches), workers={"max_restarts": 2})
    supervisor = env.external.supervisor
    message = r"seed 6, environment 0 of training: ValueError: the toy broke \(toy.py:\d+\) in a reset; "
    message += r"no worker is replaced any more after max_restarts=2 within restart_window=1e\+06 s"
    calls = []
    with pytest.raises(RunError, match=f"^{message}$"), env.external.running([5, 6]):
        calls += play(supervisor, np.array([2, 3, 5, 6]), 2)
    assert calls[0][-1].all()  # the remaining episodes ended immediately
    assert env.external.facts() == {"worker_restarts": 2}
    await_gone(launched(launches))
    with pytest.raises(RunError, match=r"^worker \d of training: ValueError: the toy broke"):  # not supervised
        supervisor.reset("training", np.array([2, 3, 5, 6]))
    supervisor.close()


def test_old_restarts_are_forgotten(marks: Path) -> None:
    workers = {"restart_window": 1e-9, "max_restarts": 1}
    env = toy(faults=[fault("fail", "reset", marks, times=5)], workers=workers)
    with env.external.running([0]):
        play(env.external.supervisor, np.array([2]), 1)
        assert env.external.facts() == {"worker_restarts": 5}


def trained(env: Any, num_iterations: int) -> tuple[list[Any], list[Any]]:
    """The states of two seeds after each iteration, and the records."""
    trainer = make_trainer(tiny_run(linear(), env, num_envs=2, total_env_steps=100), sharding=env.external.sharding())
    states, records = [trainer.init([3, 4])], []
    for _ in range(num_iterations):
        state, record = trainer.train_chunk(jax.tree.map(jnp.copy, states[-1]))
        states.append(state)
        records.append(record)
    return jax.device_get(([state._replace(keys=()) for state in states], records))


def test_a_failed_step_is_never_learned_from_and_a_failed_run_stays_as_it_is(marks: Path) -> None:
    """The episode is cut before it: a prefix of the undisturbed one, not terminated, its rest as padding.

    Its return and length are not recorded. Once workers are no longer replaced, the state is kept to the bit, so that
    it can be saved.
    """
    faults = [fault("kill", "step", marks), fault("fail", "reset", marks, times=99, after="kill-step-0")]
    env = toy(faults=faults, workers={"max_restarts": 1})
    outcome: list[Any] = []
    with pytest.raises(RunError, match="the toy broke"), env.external.running([3, 4]):
        outcome += trained(env, 2)
    states, records = outcome
    for one, other in zip(jax.tree.leaves(states[1]), jax.tree.leaves(states[2]), strict=True):
        np.testing.assert_array_equal(one, other)
    (_, undisturbed), _ = trained(Native(episode_limit=5, eval_envs=2), 1)
    replay = make_replay(env, buffer_size=6, batch_size=2)
    decode = jax.vmap(lambda rows: replay.decode(rows, 5))
    found, right = jax.device_get([decode(state.replay.experience[:, 0, :2]) for state in (states[1], undisturbed)])
    [cut] = np.argwhere((found.mask != right.mask).any(-1))
    others = np.ones((2, 2), bool)
    others[tuple(cut)] = False
    record = jax.tree.map(lambda leaf: leaf[0], records[0])  # of the one iteration of the chunk
    for seed in range(2):
        assert record.episode_return[seed] == pytest.approx(right.reward.sum(-1)[seed][others[seed]].mean())
        assert record.episode_length[seed] == right.mask.sum(-1)[seed][others[seed]].mean()
    assert np.isnan(records[1].episode_return).all()  # an iteration without a whole episode
    np.testing.assert_array_equal(found.mask[tuple(cut)], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(found.discount[tuple(cut)], np.ones(5))
    for name, leaf in found._asdict().items():
        if leaf is None or name in (
            "compact",
            "latent",
        ):  # of rows that several episodes share; another form of ``obs``; none is drawn
            continue
        # The state before the failed step is bootstrapped from, as at a time limit.
        real, padding = (3 if leaf.shape[2] == 6 else 2), name == "discount"
        np.testing.assert_array_equal(leaf[tuple(cut)][:real], getattr(right, name)[tuple(cut)][:real])
        assert (leaf[tuple(cut)][real:] == padding).all()
        np.testing.assert_array_equal(leaf[others], getattr(right, name)[others])
    np.testing.assert_array_equal(states[1].counters.env_steps, found.mask.sum((1, 2)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[1].learner))


def test_ctrl_c_is_seen_in_a_thread_that_waits_for_a_worker(marks: Path) -> None:
    """Python can't run its signal handler in the thread from which jax may call."""
    env = toy(faults=[fault("hang", "step", marks)], episode_limit=LIMIT)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # the main thread never notices it
    try:
        with pytest.raises(KeyboardInterrupt), env.external.running([0]):  # noqa: PT012 (its exit is what raises)
            waits = threading.Thread(target=play, args=(env.external.supervisor, np.array([2]), 3))
            waits.start()
            while not list(marks.iterdir()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            waits.join(timeout=30)  # half of the step's deadline
            assert not waits.is_alive()
    finally:
        signal.signal(signal.SIGINT, before)


PROGRAM = """
import signal, sys, jax
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have had ignored
from tests.envs.host.running import toy
env = toy(episode_limit=10**6, launches=sys.argv[1], child=True, faults={faults})
keys = jax.random.split(jax.random.key(0), 2)

@jax.jit
def forever(keys):
    def body(state):
        actions = env.observe(state).avail_actions.argmax(-1)
        state, _ = env.step_batch(state, actions, keys)
        return state._replace(ended=jax.numpy.zeros_like(state.ended))
    return jax.lax.while_loop(lambda state: ~state.failed.all(), body, env.reset_batch(keys))

try:
    with env.external.running([0]):
        print("begun", flush=True)
        jax.block_until_ready(forever(keys))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("hangs", [False, True], ids=["stepping", "hanging"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_parent_is_interrupted_or_killed(
    number: signal.Signals, hangs: bool, launches: Path, marks: Path
) -> None:
    """Even where workers hang in code that holds the interpreter's lock; Ctrl-C ends the compiled loop immediately."""
    faults = [fault("hang_deaf", "step", marks, times=2)] if hangs else []
    program = textwrap.dedent(PROGRAM).replace("{faults}", repr(faults))
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, "-c", program, str(launches)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        ready = marks if hangs else launches
        while len(list(ready.iterdir())) < (2 if hangs else 4) and parent.poll() is None:
            time.sleep(0.05)
        parent.send_signal(number)
        out, err = parent.communicate(timeout=120)
    assert parent.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), err
    assert out == ("begun\ninterrupted\n" if number == signal.SIGINT else "begun\n")
    assert "Exception ignored" not in err
    assert len(launched(launches)) == 4
    await_gone(launched(launches))
    assert set(os.listdir("/dev/shm")) <= before
