"""The values that a search chooses from, and the trials that can train in one compiled call."""

import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from wqmix_jax.algos.base import Algorithm, hyperparams
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build, checked
from wqmix_jax.search.settings import Range

Space = dict[str, BaseDistribution]
"""The distribution of each searched option, by the option's name."""

Params = Mapping[str, Any]
"""One choice of values, by the options' names."""

MOST_COMBINATIONS = 10_000
"""The most combinations of listed values in which an option is looked for that has no effect in the others."""


class Trial(NamedTuple):
    """One choice of values.

    Attributes:
        number: its number in the search, from 0.
        params: the values by the options' names.
    """

    number: int
    params: dict[str, Any]

    @property
    def key(self) -> str:
        """The same text for the same values."""
        return key_of(self.params)


class Group(NamedTuple):
    """Trials that train in one compiled call.

    Attributes:
        static: the values that the program is compiled for; they are common to all trials.
        traced: the names of the options that it takes as arguments.
        trials: the trials.
    """

    static: dict[str, Any]
    traced: tuple[str, ...]
    trials: list[Trial]


def make_space(algo_values: Mapping[str, Any], search: Mapping[str, Any]) -> Space:
    """Checks what is searched.

    Args:
        algo_values: the options of the algorithm, its class in ``_target_``.
        search: a list of values or a mapping of `Range` by the option's name.

    Raises:
        ConfigError: if an option is unknown, refuses a value or an end of its range, or has no effect.
    """
    space = {name: _distribution(algo_values, name, given) for name, given in search.items()}
    for name in space:
        _refuse_without_effect(algo_values, space, name)
    return space


def _distribution(algo_values: Mapping[str, Any], name: str, given: Any) -> BaseDistribution:
    if name.startswith("algo."):
        raise ConfigError(f"search.{name} is not allowed: write search.{name.removeprefix('algo.')}")
    if isinstance(given, Mapping):
        return _distribution_of_range(algo_values, name, given)
    if not isinstance(given, list):
        written = f"write a list of values, or {{{name}: {{low: .., high: ..}}}}"
        raise ConfigError(f"search.{name}={given!r} is not allowed: {written}")
    values = [_accepted(algo_values, name, value) for value in given]
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise ConfigError(f"search.{name}={value!r} is not allowed: a list of numbers, texts or null is needed")
    if len(set(values)) < max(len(values), 2):
        raise ConfigError(f"search.{name}={given} is not allowed: at least two different values are needed")
    return CategoricalDistribution(values)


def _distribution_of_range(algo_values: Mapping[str, Any], name: str, given: Mapping[str, Any]) -> BaseDistribution:
    chosen = checked(Range, {"log": False, "step": None, **given}, prefix=f"search.{name}.")
    low, high = (_accepted(algo_values, name, value) for value in (chosen.low, chosen.high))
    kinds = {type(low), type(high)}
    if not kinds <= {int, float}:
        raise ConfigError(f"search.{name}={dict(given)} is not allowed: it is no number; write a list of values")
    step = chosen.step if chosen.step is not None or float in kinds else 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a range that its step doesn't divide
            if float in kinds:
                return FloatDistribution(low, high, log=chosen.log, step=step)
            return IntDistribution(low, high, log=chosen.log, step=_whole_step(name, step))
    except (ValueError, UserWarning) as error:
        if isinstance(error, ConfigError):
            raise
        whole = f"low={low} and high={high} must be whole steps apart"
        raise ConfigError(f"search.{name}.step={step} is not allowed: {whole}") from None


def _whole_step(name: str, step: Any) -> int:
    if step != int(step):
        raise ConfigError(f"search.{name}.step={step} is not allowed: the option is an integer")
    return int(step)


def _accepted(algo_values: Mapping[str, Any], name: str, value: Any) -> Any:
    """Returns a value as the option holds it.

    Raises:
        ConfigError: if the option is unknown or refuses the value.
    """
    return getattr(build("algo", {**algo_values, name: value}), name)


def _refuse_without_effect(algo_values: Mapping[str, Any], space: Space, name: str) -> None:
    """Refuses an option that has no effect, whatever the other listed values are."""
    lists = {
        other: found.choices
        for other, found in space.items()
        if isinstance(found, CategoricalDistribution) and other != name
    }
    reason = None
    for combination in itertools.islice(itertools.product(*lists.values()), MOST_COMBINATIONS):
        try:
            algo = build("algo", {**algo_values, **dict(zip(lists, combination, strict=True))})
        except ConfigError:  # such a trial will fail
            continue
        if (reason := algo.without_effect().get(name)) is None:
            return
    if reason is not None:
        raise ConfigError(f"search.{name} is not allowed: with {reason} it has no effect")


def key_of(params: Params) -> str:
    """Returns the same text for the same values."""
    return json.dumps(params, sort_keys=True)


def traced_names(algo: Algorithm, names: Iterable[str]) -> tuple[str, ...]:
    """Returns those of the options that the compiled program takes as arguments."""
    fields = hyperparams(algo)._fields
    return tuple(name for name in names if name in fields)


def groups(algos: Mapping[int, Algorithm], trials: Sequence[Trial]) -> list[Group]:
    """Groups trials by the values that the program is compiled for, in the order of the first trial of each.

    Args:
        algos: the algorithm of each trial, by the trial's number.
        trials: trials of different values.
    """
    found: dict[str, Group] = {}
    for trial in trials:
        traced = traced_names(algos[trial.number], trial.params)
        static = {name: value for name, value in trial.params.items() if name not in traced}
        found.setdefault(key_of(static), Group(static, traced, [])).trials.append(trial)
    return list(found.values())


def as_words(params: Params) -> Iterator[str]:
    """Yields ``lr=0.00123``: values as a reader sees them."""
    for name, value in params.items():
        yield f"{name}={short(value)}"


def short(value: Any) -> str:
    """Returns a value as an option is written, numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else written(value)


def written(value: Any) -> str:
    """Returns a value as an option is written, exactly."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
