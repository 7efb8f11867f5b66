"""The part of a bridged environment that runs in numpy: serves calls for whole batches and replaces failed workers."""

import collections
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wqmix_jax.envs.host import worker
from wqmix_jax.envs.host.pool import Interrupt, Pool, Program, WorkerError
from wqmix_jax.errors import RunError
from wqmix_jax.types import EnvSpec

Shapes = dict[str, tuple[int, ...]]

Returned = tuple[np.ndarray, np.ndarray]
"""All floats and all flags of a call in two flat arrays, in the order of `Supervisor.floats` and `Supervisor.flags`.

Two and not one for each field, because each array that a callback returns costs as much as a worker's whole step.
"""


class Limits(NamedTuple):
    """Limits on the time that workers take, in seconds, and on their replacements.

    Attributes:
        launch: time for the first reset, which starts the game.
        reset: time for any other reset.
        step: time for a step.
        restarts: the most replacements within a window.
        window: the length of the window in seconds.
    """

    launch: float
    reset: float
    step: float
    restarts: int
    window: float


class Supervisor:
    """Serves the resets and steps of any number of pools, one by role: training never shares a game with evaluation.

    Attributes:
        floats, flags: names and shapes of the fields that a call returns for each row.
        restarts: the number of workers that were replaced.
        calls: the number of calls that were served, by role and command.
        interrupt: ends all waiting for workers.
        failure: the error that ended the games, None while they work. After it every episode ends immediately, as
            failed, so that the compiled program finishes and the run can still be saved.
        supervised: whether the run reads ``failure``; otherwise it is raised, out of the compiled program.
        seeds: the seeds of the run, to name the rows of a pool.
    """

    def __init__(self, program: Program, spec: EnvSpec, metrics: Sequence[str], limits: Limits) -> None:
        self._program, self._spec, self._metrics, self._limits = program, spec, list(metrics), limits
        self.floats: Shapes = {
            "obs": (spec.num_agents, spec.obs_dim),
            "state": (spec.state_dim,),
            "metrics": (len(metrics),),
            "reward": (),
        }
        self.flags: Shapes = {
            "avail_actions": (spec.num_agents, spec.num_actions),
            "terminated": (),
            "truncated": (),
            "failed": (),
        }
        self._pools: dict[str, Pool] = {}
        self._times: collections.deque[float] = collections.deque()
        self.interrupt = Interrupt()
        self.restarts, self.calls = 0, collections.Counter[tuple[str, str]]()
        self.failure: BaseException | None = None
        self.supervised = False
        self.seeds: tuple[int, ...] = ()
        weakref.finalize(self, _close_all, self._pools)  # at the latest when the process ends

    def reset(self, role: str, seeds: Any) -> Returned:
        """Begins an episode in every row, with its seed in ``seeds`` ``[F]``."""
        seeds = np.array(seeds, np.int64)
        rows = np.arange(len(seeds))
        return self._serve(role, "reset", len(seeds), rows, lambda pool: self._reset(pool, role, seeds))

    def step(self, role: str, joint_action: Any) -> Returned:
        """Plays ``joint_action`` ``[F, N]``; a row of negative actions stays as it is."""
        joint_action = np.array(joint_action)  # a copy: jax's argument is only valid during this call
        rows = np.flatnonzero(joint_action[:, 0] >= 0)
        return self._serve(
            role, "step", len(joint_action), rows, lambda pool: self._step(pool, role, rows, joint_action)
        )

    def arrays(self, role: str) -> Mapping[str, np.ndarray]:
        """Returns the fields of `Returned` by name, ``[F, ..]``, as the last call left them."""
        return self._pools[role].arrays

    def pids(self, role: str) -> list[int]:
        """Returns the process numbers of the workers, in the order of their rows."""
        return list(self._pools[role].pids()) if role in self._pools else []

    def stop(self) -> None:
        """Ends all waiting for workers."""
        self.interrupt.trigger()

    def close(self) -> None:
        """Ends all workers; a later call starts new ones."""
        _close_all(self._pools)
        self.failure, self.interrupt = None, Interrupt()

    def _serve(
        self, role: str, command: str, num_rows: int, rows: np.ndarray, obey: Callable[[Pool], Iterable[int]]
    ) -> Returned:
        """Serves one call.

        Args:
            role: whose pool serves it.
            command: "reset" or "step".
            num_rows: ``F``, rows of the pool.
            rows: the rows that are called; all of them fail if the games have ended.
            obey: carries the command out and returns the rows that failed.
        """
        self.calls[role, command] += 1
        try:
            pool = self._pool(role, num_rows)
        except OSError as error:  # too many open files, say
            self.failure = RunError(f"workers can't be started: {error}")
            if not self.supervised:
                raise self.failure from error
            return self._failed_rows(num_rows)
        failed = pool.arrays["failed"]
        failed[:] = False
        try:
            if self.failure is None:
                failed[list(obey(pool))] = True
        except WorkerError as error:  # the interpreter was removed, say
            self.failure = RunError(str(error))
        except OSError as error:  # too many open files, say
            self.failure = RunError(f"a worker can't be started: {error}")
        except (Exception, KeyboardInterrupt) as error:  # jax may call in the main thread, where Ctrl-C arrives
            self.failure = error
        if self.failure is None and self.interrupt.happened():
            self.failure = KeyboardInterrupt()
        if self.failure is not None:
            failed[rows] = True
            if not self.supervised:
                raise self.failure
        return pool.flat(list(self.floats)), pool.flat(list(self.flags))

    def _failed_rows(self, num_rows: int) -> Returned:
        """Returns the arrays of a call that no worker served: zeros, and every row has failed."""
        floats = [np.zeros((num_rows, *shape), np.float32).ravel() for shape in self.floats.values()]
        flags = [np.full((num_rows, *shape), name == "failed").ravel() for name, shape in self.flags.items()]
        return np.concatenate(floats), np.concatenate(flags)

    def _reset(self, pool: Pool, role: str, seeds: np.ndarray) -> Iterable[int]:
        pool.arrays["seed"][:] = seeds
        for name in ("reward", "terminated", "truncated"):  # a worker writes them only in a step
            pool.arrays[name][:] = 0
        missing = [row for row in range(len(seeds)) if row not in pool]
        for row in missing:
            pool.start(row, self._derived(pool, row))
        pool.trim_logs()
        causes = self._command(pool, worker.RESET, range(len(seeds)))
        while causes and not self.interrupt.happened():
            self._replace(pool, role, causes, during="a reset")
            for row in causes:  # another episode, since the same one might fail again
                pool.arrays["seed"][row] = self._derived(pool, row)
            causes = self._command(pool, worker.RESET, causes)
        return causes

    def _step(self, pool: Pool, role: str, rows: np.ndarray, joint_action: np.ndarray) -> Iterable[int]:
        pool.arrays["joint_action"][:] = joint_action
        causes = self._command(pool, worker.STEP, rows.tolist())
        if causes and not self.interrupt.happened():
            self._replace(pool, role, causes, during="a step")
        return causes

    def _command(self, pool: Pool, command: bytes, rows: Iterable[int]) -> dict[int, str]:
        timeout = self._limits.step if command == worker.STEP else self._limits.reset
        launch = self._limits.launch
        return pool.command(command, rows, timeout=timeout, launch_timeout=launch, interrupt=self.interrupt)

    def _replace(self, pool: Pool, role: str, causes: Mapping[int, str], during: str) -> None:
        """Replaces workers that failed by new ones, with new seeds.

        Raises:
            RunError: if more workers failed within the window than `Limits.restarts` allows.
        """
        for row, cause in sorted(causes.items()):
            where = self._name(pool, role, row)
            now = time.monotonic()
            while self._times and now - self._times[0] > self._limits.window:
                self._times.popleft()
            if len(self._times) >= self._limits.restarts:
                most = f"max_restarts={self._limits.restarts} within restart_window={self._limits.window:g} s"
                raise RunError(f"{where}: {cause} in {during}; no worker is replaced any more after {most}")
            self._times.append(now)
            self.restarts += 1
            print(f"warning: {where}: {cause} in {during}; the worker is replaced", file=sys.stderr, flush=True)
            pool.start(row, self._derived(pool, row))

    def _derived(self, pool: Pool, row: int) -> int:
        """Derives a new seed from the seed of the row's episode and the number of replacements so far."""
        entropy = [int(pool.arrays["seed"][row]), row, self.restarts]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)

    def _name(self, pool: Pool, role: str, row: int) -> str:
        """Names a row by seed and environment: rows are seeds times environments."""
        if not self.seeds:
            return f"worker {row} of {role}"
        per_seed = len(pool.arrays["seed"]) // len(self.seeds)
        return f"seed {self.seeds[row // per_seed]}, environment {row % per_seed} of {role}"

    def _pool(self, role: str, num_rows: int) -> Pool:
        """Returns the role's pool; a new one if the number of rows has changed."""
        held = self._pools.get(role)
        if held is not None and len(held.arrays["seed"]) == num_rows:
            return held
        if held is not None:
            held.close()
        # From the widest dtype to the narrowest, which keeps every array aligned.
        sent = {"seed": ()}, {"joint_action": (self._spec.num_agents,)}
        kinds = zip((np.int64, np.int32, np.float32, np.bool_), (*sent, self.floats, self.flags), strict=True)
        fields = {name: (dtype, (num_rows, *shape)) for dtype, held in kinds for name, shape in held.items()}
        self._pools[role] = Pool(self._program, fields, self._metrics)
        return self._pools[role]


def _close_all(pools: dict[str, Pool]) -> None:
    while pools:
        pools.popitem()[1].close()
