"""The options of a search, and the file of a search's folder that keeps them."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import pydantic
import yaml
from pydantic import Field

from wqmix_jax.config import PROGRAMS
from wqmix_jax.errors import ConfigError, install_extra
from wqmix_jax.options import PositiveInt, checked, options
from wqmix_jax.records.atomic import write_whole

SEARCH_FILE = "search.yaml"

CHANGEABLE = ("trials", "compilation_cache", *(f"env.{name}" for name in PROGRAMS))
"""Options that may be given when a search is resumed; those of ``env`` repeat those of the search."""


@options
class SearchOptions:
    """The options of this command; all others are those of a run.

    Attributes:
        search: the options of ``algo`` that are searched, by their names: ``{alpha: [0.1, 0.5], lr: {low: 1e-4, high:
            1e-2, log: true}}``. A list holds the values to choose from. A range has ``low`` and ``high``, which belong
            to it; ``log: true`` searches on a logarithmic scale, ``step: 8`` only ``low``, ``low + 8`` and so on.
        trials: number of trials; each trains ``num_seeds`` seeds with one choice of values.
        trials_per_call: number of trials that are chosen together; those that differ only in options that the compiled
            program takes as arguments train in one call.
        random_trials: number of trials whose values are drawn at random, before results are used to choose them.
        metric: the metric of the evaluations that is the objective.
        last: number of last evaluations whose mean is the objective of a seed; ``null``: the mean over all environment
            steps, the area under the curve. The objective of a trial is the mean over its seeds.
        direction: ``maximize`` or ``minimize``.
    """

    search: dict[str, Any]
    trials: PositiveInt
    trials_per_call: PositiveInt
    random_trials: Annotated[int, Field(ge=0)]
    metric: str
    last: PositiveInt | None
    direction: Literal["maximize", "minimize"]

    @pydantic.model_validator(mode="after")
    def _searches(self) -> Self:
        if not self.search:
            raise ValueError("search={} is not allowed: write search={lr: {low: 1e-4, high: 1e-2, log: true}}")
        return self


@options
class Range:
    """The range of an option that is a number.

    Attributes:
        low: the lowest value.
        high: the highest value.
        log: searches on a logarithmic scale.
        step: distance of two values; ``null``: any value between is allowed.
    """

    low: int | float
    high: int | float
    log: bool
    step: Annotated[int | float, Field(gt=0)] | None

    @pydantic.model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.high <= self.low:
            raise ValueError(f"high={self.high} is not allowed: it must be above low={self.low}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} is not allowed: with log=true it must be above 0")
        if self.log and self.step is not None:
            raise ValueError(f"step={self.step} is not allowed with log=true: choose one of them")
        return self


class Origin(NamedTuple):
    """The command line of a search, as far as it chose the options of the runs.

    Attributes:
        algo: the name of the algorithm.
        env: the name of the environment.
        overrides: the options of the runs that were given.
        config_dir: the folder of the user's yamls.
    """

    algo: str
    env: str
    overrides: list[str]
    config_dir: str | None


def refuse_missing_optuna() -> None:
    """Refuses a search without the package that chooses the values.

    Raises:
        ConfigError: if optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(f"a search needs the package optuna: {install_extra('search')}")


def save_search(folder: Path, chosen: SearchOptions, origin: Origin) -> None:
    """Writes ``search.yaml`` in the folder of a search."""
    own = {name: getattr(chosen, name) for name in SearchOptions.__dataclass_fields__}  # type: ignore[attr-defined]
    write_whole(folder / SEARCH_FILE, yaml.safe_dump({"options": own, "origin": origin._asdict()}, sort_keys=False))


def load_search(folder: Path, changes: Mapping[str, Any]) -> tuple[SearchOptions, Origin]:
    """Reads ``search.yaml``.

    Args:
        folder: the folder of the search.
        changes: options that replace those of the file.

    Raises:
        ConfigError: if the file is missing or damaged, or a changed option is not allowed.
    """
    path = folder / SEARCH_FILE
    if not path.is_file():
        raise ConfigError(f"resume={folder} is not allowed: there is no search in it ({SEARCH_FILE})")
    try:
        found = yaml.safe_load(path.read_text())
        options_, origin = dict(found["options"]), Origin(**found["origin"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    return checked(SearchOptions, {**options_, **changes}, prefix=""), origin
