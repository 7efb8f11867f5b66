"""A simulator outside of JAX as an environment: one ordered host callback per step for the whole batch.

Worker processes play; `HostState` holds the data that they sent last, so that observing stays a pure function. A
simulator is any class that fulfils `wqmix_jax.envs.host.simulator.Simulator`.

In shapes, ``F`` is the number of rows of a batch, seeds times environments, and ``M`` that of metrics.
"""

import abc
import contextlib
import copy
import functools
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.experimental import io_callback
from jax.sharding import Sharding, SingleDeviceSharding
from pydantic import Field

from wqmix_jax.envs.base import Environment, EnvState, External
from wqmix_jax.envs.host.pool import Program, WorkerError, ask
from wqmix_jax.envs.host.supervisor import Limits, Returned, Supervisor
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import PositiveInt, names_of, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, StepOutcome

Seconds = Annotated[float, Field(gt=0, strict=False)]

_SIZES = EnvSpec._fields


class HostState(NamedTuple):
    """The data that a worker sent last.

    Attributes:
        seen: the observation.
        metrics: ``[M]`` float32, the simulator's metrics.
        ended: bool, whether the episode is over; its worker waits for the next.
        failed: bool, whether the episode was cut because a worker failed; then the other fields are those of the last
            step before the failure.
    """

    seen: Observation
    metrics: Array
    ended: Array
    failed: Array


@options
class BridgedEnvironment(Environment):
    """The base of all simulators outside of JAX; a subclass names the one that the workers play.

    Attributes:
        worker_python: the interpreter that runs the workers; the one that trains when absent.
        eval_envs: games per seed that play the evaluation episodes, in turns. They are not those of training, so that
            evaluation never changes training.
        launch_timeout: seconds for a worker's first reset, which starts its game.
        reset_timeout: seconds for any other reset.
        step_timeout: seconds for a step.
        max_restarts: workers that may be replaced within ``restart_window`` seconds; one more ends the run.
        restart_window: seconds.
    """

    worker_python: str | None
    eval_envs: PositiveInt
    launch_timeout: Seconds
    reset_timeout: Seconds
    step_timeout: Seconds
    max_restarts: Annotated[int, Field(ge=0)]
    restart_window: Seconds

    _role: ClassVar[str] = "training"

    @pydantic.model_validator(mode="after")
    def _answers(self) -> Self:
        """Refuses a simulator that doesn't answer or doesn't fit, before anything is compiled."""
        python = self.program.python
        if shutil.which(python) is None:
            raise ValueError(f"worker_python={python} is not allowed: it is not an interpreter that can be run")
        interpreter = "" if self.worker_python is None else f" with worker_python={python}"
        try:
            answer = self._answer
        except WorkerError as error:
            if re.match(rf"({'|'.join(names_of(type(self)))})(=| is missing)", str(error)):
                raise ValueError(str(error)) from None
            raise ValueError(f"{type(self).__name__} can't be used{interpreter}: {error}") from None
        wrong = _misfit(answer)
        if wrong:
            raise ValueError(f"{type(self).__name__} can't be used: {wrong}")
        return self

    @property
    @abc.abstractmethod
    def played(self) -> tuple[str, dict[str, Any]]:
        """The simulator, as `Program` names it, and the arguments of its constructor except its seed."""

    @property
    def program(self) -> Program:
        """The program of each worker."""
        return Program(self.worker_python or sys.executable, *self.played)

    @functools.cached_property
    def _answer(self) -> Mapping[str, Any]:
        return _ask(self.program, self.launch_timeout)

    @property
    def info(self) -> dict[str, Any]:
        """The simulator's sizes."""
        return self._answer["info"]

    @property
    def external(self) -> "Workers":
        """The worker processes."""
        return self._workers

    @functools.cached_property
    def _workers(self) -> "Workers":
        limits = Limits(
            self.launch_timeout, self.reset_timeout, self.step_timeout, self.max_restarts, self.restart_window
        )
        supervisor = Supervisor(self.program, self.spec, self._metrics, limits)
        return Workers(supervisor, self.eval_envs, self._answer["versions"])

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`."""
        return EnvSpec(*(self.info[name] for name in _SIZES))

    @property
    def _metrics(self) -> list[str]:
        return self.info.get("metrics", [])

    def reset(self, key: PRNGKey) -> HostState:
        """Begins the episode of a batch of one."""
        return jax.tree.map(lambda leaf: leaf[0], self.reset_batch(key[None]))

    def step(self, env_state: HostState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Plays a step of a batch of one."""
        batch = jax.tree.map(lambda leaf: leaf[None], (env_state, joint_action, key))
        return jax.tree.map(lambda leaf: leaf[0], self.step_batch(*batch))

    def reset_batch(self, keys: PRNGKey) -> HostState:
        """Begins an episode in every row; the simulator gets a seed that is drawn with the row's key."""
        # 31 bits, so that a seed is a non-negative int32.
        seeds = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32) >> 1)(keys)
        serve = functools.partial(self.external.supervisor.reset, self._role)
        return self._call(serve, seeds)[0]

    def step_batch(self, env_state: HostState, joint_action: Array, keys: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Plays a step of every row whose episode isn't over; a row that fails keeps its state."""
        # Rows run in lockstep: one whose episode is over gets negative actions, which no worker is asked to play.
        idle = env_state.ended | env_state.failed
        asked = jax.vmap(jnp.where)(idle, jnp.full_like(joint_action, -1), joint_action)
        serve = functools.partial(self.external.supervisor.step, self._role)
        following, outcome = self._call(serve, asked.astype(jnp.int32))
        # The callback returns all rows. Those that are idle or failed keep their state, and their outcome is zero.
        stays = idle | following.failed
        kept = jax.tree.map(functools.partial(jax.vmap(jnp.where), stays), env_state, following)
        kept = kept._replace(failed=env_state.failed | following.failed)
        return kept, jax.tree.map(lambda leaf: jnp.where(stays, jnp.zeros_like(leaf), leaf), outcome)

    def observe(self, env_state: HostState) -> Observation:
        """Returns the observation that the worker sent."""
        return env_state.seen

    def failed(self, env_state: HostState) -> Array:
        """Returns True if a worker failed in this episode."""
        return env_state.failed

    def metrics(self, env_state: HostState) -> dict[str, Array]:
        """Returns the simulator's metrics."""
        return {name: env_state.metrics[index] for index, name in enumerate(self._metrics)}

    def for_evaluation(self) -> Self:
        """Returns the same environment, played by the games of evaluation."""
        twin = copy.copy(self)
        vars(twin).update(_workers=self._workers, _role="evaluation")
        return twin

    def episodes_at_once(self, num_episodes: int) -> int:
        """Returns the smallest number that needs no more turns than ``eval_envs`` games do."""
        turns = -(-num_episodes // self.eval_envs)
        return -(-num_episodes // turns)

    def _call(self, serve: Callable[[Any], Returned], argument: Array) -> tuple[HostState, StepOutcome]:
        """Calls the host, the one place where the compiled program does so.

        Args:
            serve: the method of the supervisor that serves the call.
            argument: ``[F, ..]``, its argument.

        Returns:
            The state and the outcome that the host returned, leaves ``[F, ..]``.
        """
        supervisor, num_rows = self.external.supervisor, argument.shape[0]
        kinds = ((np.float32, supervisor.floats), (np.bool_, supervisor.flags))
        shapes = [(num_rows * sum(math.prod(shape) for shape in held.values()), dtype) for dtype, held in kinds]
        # Ordered: calls have side effects, so none may be dropped, repeated or exchanged. A call returns one flat array
        # for each dtype, because each array that a callback returns costs as much as a worker's step.
        flat = io_callback(
            serve, tuple(jax.ShapeDtypeStruct((n,), dtype) for n, dtype in shapes), argument, ordered=True
        )
        sent: dict[str, Array] = {}
        for (_, held), values in zip(kinds, flat, strict=True):
            ends = np.cumsum([num_rows * math.prod(shape) for shape in held.values()])
            parts = jnp.split(values, ends[:-1].tolist())
            sent |= {n: part.reshape(num_rows, *held[n]) for n, part in zip(held, parts, strict=True)}
        outcome = StepOutcome(sent["reward"], sent["terminated"], sent["truncated"])
        seen = Observation(sent["obs"], sent["state"], sent["avail_actions"])
        return HostState(seen, sent["metrics"], outcome.terminated | outcome.truncated, sent["failed"]), outcome


class Workers(External):
    """The worker processes of a bridged environment.

    Attributes:
        supervisor: what the compiled program calls.
    """

    def __init__(self, supervisor: Supervisor, eval_envs: int, versions: dict[str, str]) -> None:
        self.supervisor = supervisor
        self._eval_envs, self._versions = eval_envs, versions

    def sharding(self) -> Sharding:
        """Returns the first device: ordered callbacks are ordered only within one device.

        Raises:
            ConfigError: if JAX_PLATFORMS excludes the CPU, or the device's runtime has no host callbacks.
        """
        device = jax.local_devices()[0]
        chosen = jax.config.values["jax_platforms"]  # jax runs callbacks on its CPU backend, so there must be one
        if chosen and "cpu" not in chosen.split(","):
            raise ConfigError(f"JAX_PLATFORMS={chosen} is not allowed with this environment: write {chosen},cpu")
        try:
            with jax.default_device(device):
                jax.block_until_ready(jax.jit(_call_host)())
        except Exception as error:  # each runtime has its own
            reason = f"{device.device_kind} can't call the host ({str(error).splitlines()[0]})"
            raise ConfigError(f"this environment is not allowed here: {reason}; JAX_PLATFORMS=cpu works") from None
        return SingleDeviceSharding(device)

    def lines(self, num_seeds: int, num_envs: int) -> Iterator[str]:
        """Yields the number of games, their versions, and the number of devices."""
        versions = ", ".join(f"{name} {version}" for name, version in self._versions.items())
        games = f"{num_seeds * num_envs} to train and {num_seeds * self._eval_envs} to evaluate"
        yield f"worker processes: {games}{versions and f' ({versions})'}"
        yield "the workers are called in a fixed order, so one device trains all seeds"

    def versions(self) -> dict[str, str]:
        """Returns the versions that the simulator reports."""
        return self._versions

    @contextlib.contextmanager
    def running(self, seeds: Sequence[int]) -> Iterator[None]:
        """See `External.running`; afterwards all workers have ended, however the run ended.

        Raises:
            RunError: the error that ended the games, unless the run raised an exception itself.
            KeyboardInterrupt: if Ctrl-C ended them.
        """
        supervisor = self.supervisor
        supervisor.seeds, supervisor.supervised, supervisor.restarts = tuple(seeds), True, 0
        try:
            with supervisor.interrupt.watching():
                yield
            if supervisor.failure is not None:
                raise supervisor.failure
        except jax.errors.JaxRuntimeError:
            supervisor.interrupt.read()
            if supervisor.interrupt.happened():  # in jax's own Python code around a callback
                raise KeyboardInterrupt from None
            raise
        finally:
            supervisor.stop()
            with contextlib.suppress(Exception):
                jax.effects_barrier()  # waits for a program that still runs
            supervisor.supervised, supervisor.seeds = False, ()
            supervisor.close()

    def failure(self) -> BaseException | None:
        """See `External.failure`."""
        return self.supervisor.failure

    def facts(self) -> dict[str, Any]:
        """Returns the number of workers that were replaced."""
        return {"worker_restarts": self.supervisor.restarts}


@options
class HostEnvironment(BridgedEnvironment):
    """A custom simulator.

    Attributes:
        simulator: ``FILE.py:CLASS``, with the file where Python finds modules, or ``module:CLASS``.
        options: arguments of its constructor.
    """

    simulator: str
    options: dict[str, Any]

    @property
    def played(self) -> tuple[str, dict[str, Any]]:
        """See `BridgedEnvironment.played`."""
        file = simulator_file(self.simulator)
        name = self.simulator.rpartition(":")[2]
        return self.simulator if file is None else f"{file}:{name}", self.options

    @pydantic.field_validator("simulator")
    @classmethod
    def _names_a_class(cls, simulator: str) -> str:
        where, _, name = simulator.rpartition(":")
        if not where or not name:
            raise ValueError("write FILE.py:CLASS or module:CLASS")
        if (file := simulator_file(simulator)) is not None and not file.is_file():
            raise ValueError("there is no such file; start in its folder, or name that with --config-dir")
        return simulator


def _misfit(answer: Mapping[str, Any]) -> str | None:
    """Describes what is wrong with a simulator's ``info`` and ``versions``; None if nothing is."""
    info, versions = answer["info"], answer["versions"]
    for method, found in (("info", info), ("versions", versions)):
        if not isinstance(found, dict):
            return f"its {method}() returns {found!r}, but a dict is needed"
    for name in _SIZES:
        size = info.get(name)
        if type(size) is not int or size < 1:
            given = f"gives {name}={size!r}" if name in info else f"lacks {name}"
            return f"its info() {given}: a whole number above 0 is needed"
    metrics = info.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics):
        return f"its info() gives metrics={metrics!r}: a list of names is needed"
    return None


def _call_host() -> Array:
    return io_callback(lambda: np.True_, jax.ShapeDtypeStruct((), np.bool_), ordered=True)


def simulator_file(simulator: str) -> Path | None:
    """Returns the absolute path in ``FILE.py:CLASS``, searched like Python's modules; None for ``module:CLASS``."""
    where = simulator.rpartition(":")[0]
    if not where.endswith(".py"):
        return None
    found = next((path for folder in ("", *sys.path) if (path := Path(folder) / where).is_file()), Path(where))
    return found.absolute()


_answers: dict[tuple[str, ...], dict[str, Any]] = {}


def _ask(program: Program, timeout: float) -> Mapping[str, Any]:
    """Returns `pool.ask`, called once for each program and values of the variables that change its answer."""
    place = (repr(program), os.environ.get("PYTHONPATH", ""), os.environ.get("SC2PATH", ""))
    if place not in _answers:
        _answers[place] = ask(program, timeout)
    return _answers[place]
