"""The members of one call: every seed, and every seed again for each combination of swept options."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from wqmix_jax.algos.base import Algorithm, hyperparams
from wqmix_jax.errors import ConfigError


class Member(NamedTuple):
    """One run of training: a seed with its swept values.

    Attributes:
        seed: the seed.
        swept: the values of the swept options, by their names in ``algo``.
    """

    seed: int
    swept: tuple[tuple[str, float], ...] = ()

    @property
    def labels(self) -> dict[str, Any]:
        """The labels in its records: ``seed``, and its swept options as ``algo.NAME``."""
        return {"seed": self.seed, **{f"algo.{name}": value for name, value in self.swept}}


def make_members(algo: Algorithm, seeds: Iterable[int], sweep: Mapping[str, Sequence[float]]) -> tuple[Member, ...]:
    """Lists all seeds with the first combination of a sweep, then all with the second, and so on.

    Args:
        algo: the algorithm whose options are swept.
        seeds: the seeds.
        sweep: values by the option's name; the last changes fastest.

    Raises:
        ConfigError: if an option is not one that the compiled program takes as an argument, or has no effect.
    """
    traced = hyperparams(algo)._fields
    for name in sweep:
        if name not in traced:
            one_by_one = f"train -m algo.{name}=A,B runs one after the other"
            raise ConfigError(
                f"sweep.{name} is not allowed: in one call go {', '.join(traced)}; python -m wqmix_jax.{one_by_one}"
            )
        if None in sweep[name]:
            one_by_one = f"train -m algo.{name}=null,B runs one after the other"
            raise ConfigError(f"sweep.{name} is not allowed to have null: python -m wqmix_jax.{one_by_one}")
        if name in (unused := algo.without_effect()):
            raise ConfigError(f"sweep.{name} is not allowed: with {unused[name]} it has no effect")
    seeds = list(seeds)
    combinations = itertools.product(*([(name, value) for value in values] for name, values in sweep.items()))
    return tuple(Member(seed, combination) for combination in combinations for seed in seeds)


def labels_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the labels of a record's member."""
    return {key: value for key, value in line.items() if key == "seed" or key.startswith("algo.")}


def member_name(labels: Mapping[str, Any]) -> str:
    """Returns a short name for labels: ``3``, in a sweep ``3-alpha0.1``."""
    swept = (f"{key.removeprefix('algo.')}{value}" for key, value in labels.items() if key != "seed")
    return "-".join([str(labels["seed"]), *swept])


def setting_name(labels: Mapping[str, Any]) -> str:
    """Returns a sweep's values without the seed, ``alpha=0.1, lr=0.001``; empty outside a sweep."""
    swept = {key: value for key, value in labels_of(labels).items() if key != "seed"}
    return ", ".join(f"{key.removeprefix('algo.')}={value}" for key, value in swept.items())
