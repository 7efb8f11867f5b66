"""Callbacks: users' classes that see each evaluation of a run, add metrics to its records and may end it.

A callback is a class of options, as an algorithm is, and holds no state itself. Its state is plain data that it
returns; a run saves it with its checkpoints, so that a resumed run's callbacks continue where they were.
"""

import abc
import copy
import json
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from pydantic import Field

from wqmix_jax.config import RunConfig
from wqmix_jax.errors import RunError
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.training.compiled_loop import TrainState
from wqmix_jax.training.host_loop import Line, Loop
from wqmix_jax.training.members import Member, labels_of


class Evaluation(NamedTuple):
    """An evaluation of all members.

    Attributes:
        records: the new records, train and eval, as `metrics.jsonl` will have them. A callback may add numbers under
            new keys, which are written with the record and shown by all loggers; it can't change others.
        state: the train state, leaves ``[S, ..]``. It must not be kept: the next chunk overwrites its buffers.
        members: the members, in the order of ``S``.
        config: the options of the run.
    """

    records: list[Line]
    state: TrainState
    members: tuple[Member, ...]
    config: RunConfig

    def eval_records(self) -> Iterator[tuple[int, Line]]:
        """Yields the place on the axis ``S`` and the record of each member that was evaluated."""
        places = {tuple(member.labels.items()): place for place, member in enumerate(self.members)}
        for record in self.records:
            if record["kind"] == "eval":
                yield places[tuple(labels_of(record).items())], record


class Outcome(NamedTuple):
    """The result of a callback.

    Attributes:
        state: the callback's new state, plain data: None, booleans, numbers, strings, and lists and dicts of them.
            It is passed to the next call as JSON gives it back, so a tuple becomes a list.
        stop: the reason to end the run now, for all members; None to continue.
    """

    state: Any
    stop: str | None = None


@options
class Callback(abc.ABC):
    """The contract of a callback.

    A subclass is declared with `wqmix_jax.options.options`; its attributes are options, which may have defaults. It
    is used as ``callbacks=[MODULE.CLASS]``, with options as ``callbacks=[{_target_: MODULE.CLASS, NAME: VALUE}]``.
    """

    def initial_state(self) -> Any:
        """Returns the state before the first evaluation; None by default."""
        return None

    @abc.abstractmethod
    def on_evaluation(self, evaluation: Evaluation, state: Any) -> Outcome | None:
        """Sees an evaluation, the first of which is made before any learning.

        If it raises an exception, the run is saved and ends with one line that names the callback. When the run is
        resumed, the evaluation is repeated.

        Args:
            evaluation: the records and the train state.
            state: the state that the previous call returned, or `initial_state`.

        Returns:
            The new state, and maybe a reason to end the run. None keeps the state and continues.
        """


@options
class EarlyStopping(Callback):
    """Ends a run whose evaluations have stopped improving, or have reached a value.

    It looks at the mean of a metric over the members that were evaluated.

    Attributes:
        metric: a key of eval records, larger is better.
        patience: the evaluations without a new best value after which the run ends.
        min_delta: a value must be this much better than the best to count as new.
        target: a value at which the run ends; ``null``: there is none.
    """

    metric: str = "episode_return"
    patience: PositiveInt = 20
    min_delta: float = Field(default=0.0, ge=0)
    target: float | None = None

    def initial_state(self) -> Any:
        """Returns the state without a best value."""
        return {"best": None, "since": 0}

    def on_evaluation(self, evaluation: Evaluation, state: Any) -> Outcome | None:
        """See `Callback.on_evaluation`.

        Raises:
            ValueError: if the records don't have the metric.
        """
        records, best = [record for _, record in evaluation.eval_records()], state["best"]
        if not records:  # every member has failed
            return None
        if missing := [record for record in records if self.metric not in record]:
            raise ValueError(f"metric={self.metric} is not allowed: eval records have {', '.join(missing[0])}")
        mean = float(np.mean([record[self.metric] for record in records]))
        if self.target is not None and mean >= self.target:
            return Outcome(state, stop=f"{self.metric} is {mean:.5g}, the target is {self.target:.5g}")
        if not math.isnan(mean) and (best is None or mean > best + self.min_delta):
            return Outcome({"best": mean, "since": 0})
        since = state["since"] + 1
        reason = f"{self.metric} has not improved for {since} evaluations; its best mean is {best}"
        return Outcome({"best": best, "since": since}, stop=reason if since >= self.patience else None)


class Stopped(NamedTuple):
    """The end of a run that a callback asked for.

    Attributes:
        callback: the callback's class.
        reason: its reason.
    """

    callback: str
    reason: str


class Callbacks:
    """The callbacks of a run in this process, with their states.

    Attributes:
        stopped: the first callback that asked to stop; None while there is none.
    """

    def __init__(self, config: RunConfig) -> None:
        """Starts all callbacks.

        Raises:
            RunError: if one of them fails.
        """
        self._config, self.stopped = config, None
        self._callbacks: dict[str, Callback] = {}
        for callback in config.callbacks:
            name = f"{type(callback).__module__}.{type(callback).__qualname__}"
            again = sum(known.split("#")[0] == name for known in self._callbacks)
            self._callbacks[f"{name}#{again + 1}" if again else name] = callback
        self.states = {name: _guarded(name, callback.initial_state) for name, callback in self._callbacks.items()}
        self.states = {name: _plain(name, state) for name, state in self.states.items()}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Takes over the states of a checkpoint; a callback that has none there starts afresh."""
        self.states |= {name: state for name, state in states.items() if name in self._callbacks}

    def see(self, loop: Loop, records: Sequence[Line]) -> list[Line]:
        """Shows an evaluation to all callbacks, in the order of the option; each sees the metrics of those before it.

        If one fails, the states of all stay as they were.

        Args:
            loop: the state of training.
            records: the new records, which stay as they are.

        Returns:
            The records with the callbacks' metrics.

        Raises:
            RunError: if a callback fails, or does something that it may not do.
        """
        states, stopped, seen = {}, None, list(records)
        for name, callback in self._callbacks.items():
            given = [dict(record) for record in seen]
            evaluation = Evaluation(given, loop.state, loop.members, self._config)
            # A copy: a callback that changes it and then fails, or another one does, must not have counted already.
            state = copy.deepcopy(self.states[name])
            outcome = _guarded(name, callback.on_evaluation, evaluation, state)
            if not isinstance(outcome, Outcome | None):
                raise RunError(f"callback {name} is not allowed to return {outcome!r}: return an Outcome or None")
            seen = _with_metrics(name, seen, given)
            states[name] = self.states[name] if outcome is None else _plain(name, outcome.state)
            if outcome is not None and outcome.stop is not None and stopped is None:
                stopped = Stopped(name, " ".join(str(outcome.stop).split()))
        self.states, self.stopped = states, stopped
        return seen


def _guarded(name: str, function: Any, *arguments: Any) -> Any:
    """Calls a callback; its exceptions become one line with the place in its file."""
    try:
        return function(*arguments)
    except Exception as error:  # users' code may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"callback {name} failed ({reason}, in {last.filename}, line {last.lineno})") from error


def _plain(name: str, state: Any) -> Any:
    try:
        return json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        raise RunError(f"callback {name} has a state that is not plain data: {error}") from error


def _with_metrics(name: str, before: Sequence[Line], after: Sequence[Line]) -> list[Line]:
    """Returns the records with the numbers that a callback has added.

    Raises:
        RunError: if it has changed something else.
    """
    if len(before) != len(after):
        raise RunError(f"callback {name} is not allowed to change the list of records: it may only add metrics to them")
    merged = []
    for old, new in zip(before, after, strict=True):
        changed = [key for key in old if key not in new or new[key] is not old[key]]
        if changed:
            raise RunError(f"callback {name} is not allowed to change {changed[0]} of a record: use another name")
        merged.append({**old, **{key: _number(name, key, new[key]) for key in new if key not in old}})
    return merged


def _number(name: str, key: Any, value: Any) -> float:
    if not isinstance(key, str) or key.startswith("algo."):  # a label of sweeps
        raise RunError(f"callback {name} is not allowed to add {key!r} to a record: use another name")
    if np.ndim(value) != 0 or not _is_real(value):
        raise RunError(f"callback {name} is not allowed to add {key}={value!r} to a record: a number is needed")
    return np.asarray(value).item()


def _is_real(value: Any) -> bool:
    """Returns True for integers and floating numbers, bfloat16 included."""
    kind = np.asarray(value).dtype
    return jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating)
