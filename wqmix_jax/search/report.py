"""The results of a search: a table of the best trials, all trials as a csv file, and a picture of the importances."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from wqmix_jax.records.plotting import COLOURS, new_figure, save_figure
from wqmix_jax.records.text_table import Row, show, write_csv
from wqmix_jax.runs.startup import shell_command
from wqmix_jax.search.settings import Origin, SearchOptions
from wqmix_jax.search.space import Params, short, written
from wqmix_jax.search.trials import ended, read_result

CSV_FILE, PICTURE_FILE = "trials.csv", "importance.png"

BEST_SHOWN = 10
"""The most trials of the printed table."""


def report(folder: Path, chosen: SearchOptions, origin: Origin, study: optuna.Study) -> None:
    """Prints the best trials and the command that trains the best; writes ``trials.csv`` and ``importance.png``.

    Args:
        folder: the folder of the search.
        chosen: the options of the search.
        origin: the options of its runs.
        study: the study, with at least one trial that has ended.
    """
    write_csv(list(csv_rows(folder, study)), folder / CSV_FILE)
    best = best_first(study)
    failed = len(ended(study)) - len(best)
    print(f"\n{len(best)} trials have a result{f', {failed} failed' if failed else ''}: {folder / CSV_FILE}")
    if not best:
        return
    show([_row(folder, chosen.metric, trial) for trial in best[:BEST_SHOWN]])
    importances = importances_of(study)
    if importances is None:
        print("the importance of the options needs more trials with different results")
    else:
        print(f"importance of the options: {draw(importances, folder / PICTURE_FILE)}")
    print(f"\nto train with the best values:\n{best_command(origin, best[0].params)}", flush=True)


def best_first(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials with a result, the best first, of equal ones the earlier first."""
    sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(found, key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def _row(folder: Path, metric: str, trial: FrozenTrial) -> Row:
    """Returns a row of the printed table; the range of the seeds if there are several."""
    seeds = read_result(folder, trial.number).objectives.values()
    spread = {"lowest seed": short(min(seeds)), "highest seed": short(max(seeds))} if len(seeds) > 1 else {}
    params = {name: short(value) for name, value in trial.params.items()}
    return {"trial": trial.number, metric: short(trial.value), **spread, **params}


def csv_rows(folder: Path, study: optuna.Study) -> Iterator[Row]:
    """Yields a row for each trial that has ended."""
    for trial in ended(study):
        result = read_result(folder, trial.number)
        seeds = {f"seed_{seed}": "" if math.isnan(value) else value for seed, value in result.objectives.items()}
        outcome = {"state": trial.state.name.lower(), "objective": "" if trial.value is None else trial.value}
        params = {name: written(value) for name, value in trial.params.items()}
        ending = {"same_as": "" if result.same_as is None else result.same_as, "reason": result.reason or ""}
        yield {"trial": trial.number, **outcome, **params, **seeds, **ending}


def importances_of(study: optuna.Study) -> dict[str, float] | None:
    """Returns the importance of each option, which sum to 1: how far the values of the best tenth differ from all.

    This is PED-ANOVA (Watanabe et al. 2023), with optuna's settings. Returns None if there are too few different
    results.
    """
    if len(best_first(study)) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        except UserWarning:  # optuna would make them all equal
            return None


def draw(importances: Params, path: Path) -> Path:
    """Draws the importances as bars and returns the path of the picture."""
    figure = new_figure(6.4, 1.0 + 0.4 * len(importances))
    axes = figure.subplots()
    names = list(importances)[::-1]
    bars = axes.barh(names, [importances[name] for name in names], color=COLOURS[1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("importance (PED-ANOVA)")
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def best_command(origin: Origin, params: Params) -> str:
    """Returns the command line that trains a run with the values of a trial."""
    values = [f"algo.{name}={written(value)}" for name, value in params.items()]
    return shell_command("train", [*origin.overrides, *values], origin.config_dir)
