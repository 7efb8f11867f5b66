"""The trials of a search: chosen by optuna, trained in groups, and kept in the search's folder.

``study.jsonl`` is optuna's journal: the values and the objective of each trial. ``trials/0007`` holds the files of a
run that `wqmix_jax.table` reads: ``run.json``, ``config.yaml``, ``metrics.jsonl`` and ``summary.json``. A trial is
reported to optuna after its folder is complete, so a trial that was interrupted is trained again.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import wqmix_jax
from wqmix_jax.config import RunConfig, with_checked_numbers
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build, checked
from wqmix_jax.records.atomic import write_whole
from wqmix_jax.records.metrics import MetricsFile, create_metrics, read_mapping
from wqmix_jax.records.run_dir import SUMMARY_FILE, save_config
from wqmix_jax.records.statistics import SeedCurves, mean_over_training
from wqmix_jax.search.settings import Origin, SearchOptions
from wqmix_jax.search.space import Group, Space, Trial, as_words, groups, key_of
from wqmix_jax.training.members import Member, labels_of

STUDY_FILE, TRIAL_DIR = "study.jsonl", "trials"

Line = dict[str, Any]

Train = Callable[..., tuple[Any, list[Line]]]
"""A function like `wqmix_jax.api.train_members`."""


class Search(NamedTuple):
    """A search.

    Attributes:
        folder: the folder of the search.
        chosen: its options.
        config: the options of its runs, which each trial changes.
        values: the same as nested mappings.
        space: the searched options.
        origin: the names of the algorithm and the environment.
    """

    folder: Path
    chosen: SearchOptions
    config: RunConfig
    values: Mapping[str, Any]
    space: Space
    origin: Origin


class Result(NamedTuple):
    """The result of a trial.

    Attributes:
        objectives: the objective of each seed; nan for one that failed.
        reason: the reason for which the trial failed; None if it didn't.
        failed: the identity of each seed that failed.
        same_as: the number of an earlier trial with the same values, whose records are copied.
    """

    objectives: dict[int, float]
    reason: str | None
    failed: tuple[Line, ...] = ()
    same_as: int | None = None

    @property
    def objective(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(list(self.objectives.values())))


def open_study(folder: Path, direction: Literal["maximize", "minimize"]) -> optuna.Study:
    """Opens the study in the folder of a search; a new one if there is none."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / STUDY_FILE
    storage = JournalStorage(JournalFileBackend(str(path)))
    if path.is_file() and path.stat().st_size > 0:
        return optuna.load_study(storage=storage, study_name="search")
    return optuna.create_study(storage=storage, study_name="search", direction=direction)


def run_trials(search: Search, study: optuna.Study, *, train: Train) -> None:
    """Trains until the search has ``trials`` trials; one line on stdout for each.

    Args:
        search: the search.
        study: its study; trials of it that were interrupted are trained first.
        train: trains the members of a group.
    """
    _fail_incomplete(search, study)
    while batch := next_batch(search, study):
        originals = _first_of_equals(study)
        fresh = [trial for trial in batch if originals[trial.key] == trial.number]
        built = {trial.number: config for trial in fresh if (config := _built(search, study, trial)) is not None}
        algos = {number: config.algo for number, config in built.items()}
        for group in groups(algos, [trial for trial in fresh if trial.number in built]):
            _train_group(search, study, group, built[group.trials[0].number], train)
        for trial in batch:
            if trial not in fresh:
                _copy(search, study, trial, originals[trial.key])


def next_batch(search: Search, study: optuna.Study) -> list[Trial]:
    """Returns the trials that train next: those that were interrupted, filled up with new ones.

    A trial's random numbers depend on the seed and its number alone, so a search that was interrupted chooses the same
    values as one that was not.
    """
    chosen, size = search.chosen, search.chosen.trials_per_call
    waiting = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    begun = len(study.get_trials(deepcopy=False))
    first = min((trial.number for trial in waiting), default=begun)
    batch = [Trial(trial.number, dict(trial.params)) for trial in waiting]
    for number in range(begun, min((first // size + 1) * size, chosen.trials)):
        study.sampler = _sampler(search, number)
        batch.append(Trial(number, dict(study.ask(fixed_distributions=search.space).params)))
    return batch


def _fail_incomplete(search: Search, study: optuna.Study) -> None:
    """Fails a trial that was interrupted while its values were chosen: optuna doesn't choose the others later."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.params.keys() != search.space.keys():
            result = Result(_no_objectives(search), "it was interrupted while its values were chosen")
            _finish(search, study, Trial(trial.number, dict(trial.params)), [], result)


def _no_objectives(search: Search) -> dict[int, float]:
    return dict.fromkeys(search.config.seeds, math.nan)


def _sampler(search: Search, number: int) -> optuna.samplers.BaseSampler:
    """Returns the sampler of one trial, which counts trials that still train as bad and so avoids their values."""
    [seed] = np.random.SeedSequence([search.config.seed, number]).generate_state(1)
    return optuna.samplers.TPESampler(seed=int(seed), constant_liar=True, n_startup_trials=search.chosen.random_trials)


def _first_of_equals(study: optuna.Study) -> dict[str, int]:
    """Returns the number of the first trial of each choice of values, the trials that train now included."""
    found: dict[str, int] = {}
    for trial in study.get_trials(deepcopy=False):
        found.setdefault(key_of(trial.params), trial.number)
    return found


def _built(search: Search, study: optuna.Study, trial: Trial) -> RunConfig | None:
    """Builds the options of a trial's run; a trial whose values don't fit together fails here, and gives None."""
    try:
        algo = build("algo", {**search.values["algo"], **trial.params})
        fields = {field.name: getattr(search.config, field.name) for field in dataclasses.fields(search.config)}  # type: ignore[arg-type]
        env = build("env", search.values["env"])  # one that plays outside of JAX is used by one call
        return checked(RunConfig, {**fields, "algo": algo, "env": env}, prefix="")
    except ConfigError as error:
        _finish(search, study, trial, [], Result(_no_objectives(search), str(error)))
        return None


def _train_group(search: Search, study: optuna.Study, group: Group, config: RunConfig, train: Train) -> None:
    """Trains the trials of a group in one call."""
    numbers = ", ".join(str(trial.number) for trial in group.trials)
    which = f"trials {numbers}" if len(group.trials) > 1 else f"trial {numbers}"
    static = f" ({', '.join(as_words(group.static))})" if group.static else ""
    print(f"training {which} in one call{static}", flush=True)
    members = {trial.number: _members(trial, group.traced, config.seeds) for trial in group.trials}
    everyone = tuple(member for each in members.values() for member in each)
    state, records = train(config, everyone, progress=None if config.logger.progress else False)
    failed = [member.labels for member, is_out in zip(everyone, np.array(state.failed), strict=True) if is_out]
    for trial in group.trials:
        own = [member.labels for member in members[trial.number]]
        lines = [_without_values(line) for line in records if labels_of(line) in own]
        out = [labels["seed"] for labels in own if labels in failed]
        _finish(search, study, trial, lines, _result(search, lines, out))


def _members(trial: Trial, traced: Sequence[str], seeds: Sequence[int]) -> list[Member]:
    swept = tuple((name, trial.params[name]) for name in traced)
    return [Member(seed, swept) for seed in seeds]


def _without_values(line: Line) -> Line:
    """Returns a record without the values of its trial, which the trial's ``config.yaml`` has."""
    return {name: value for name, value in line.items() if not name.startswith("algo.")}


def _result(search: Search, lines: Sequence[Line], failed: Sequence[int]) -> Result:
    """Returns the result of a trial from its records and the seeds that failed."""
    seeds = list(search.config.seeds)
    chosen = search.chosen
    objectives = {
        seed: math.nan if seed in failed else objective(lines, seed, chosen.metric, chosen.last) for seed in seeds
    }
    last = [next((line for line in reversed(lines) if line["seed"] == seed), {"seed": seed}) for seed in failed]
    counts = tuple({name: line[name] for name in ("seed", "env_steps") if name in line} for line in last)
    reason = None
    if failed:
        reason = f"{len(failed)} of {len(seeds)} seeds diverged (non-finite loss or parameters): {failed}"
    elif not np.isfinite(list(objectives.values())).all():
        reason = f"{chosen.metric} is not finite"
    return Result(objectives, reason, counts)


def objective(lines: Sequence[Line], seed: int, metric: str, last: int | None) -> float:
    """Returns the objective of one seed.

    Args:
        lines: records of a trial.
        seed: the seed.
        metric: the metric of its evaluations.
        last: the number of last evaluations whose mean it is; None for the mean over all environment steps.

    Raises:
        ConfigError: if the evaluations don't have the metric.
    """
    curve = [line for line in lines if line["kind"] == "eval" and line["seed"] == seed]
    if not all(metric in line for line in curve):
        raise ConfigError(f"metric={metric} is not allowed: the evaluations have {', '.join(curve[0])}")
    values = np.array([line[metric] for line in curve], np.float64)
    if last is not None:
        return float(values[-last:].mean())
    steps = np.array([line["env_steps"] for line in curve], np.float64)
    return float(mean_over_training(SeedCurves(steps, values[:, None]))[0])


def _finish(search: Search, study: optuna.Study, trial: Trial, lines: Sequence[Line], result: Result) -> None:
    """Writes the folder of a trial, then reports its result to optuna."""
    folder = trial_folder(search.folder, trial.number)
    shutil.rmtree(folder, ignore_errors=True)  # of a process that ended before it had reported the trial
    folder.mkdir(parents=True)
    create_metrics(
        folder,
        version=wqmix_jax.__version__,
        algo=search.origin.algo,
        env=search.origin.env,
        members=[{"seed": seed} for seed in search.config.seeds],
        map_name=search.values["env"].get("map"),
        simulator=search.config.env.external.versions(),
    )
    with MetricsFile(folder, num_bytes=0) as file:
        file.write(lines)
    algo = {**search.values["algo"], **trial.params}
    values = {**with_checked_numbers(search.values, search.config), "algo": algo, "run_dir": str(folder)}
    save_config(folder, values)
    _save_summary(folder, trial, lines, result)
    _report(study, trial, result)


def _save_summary(folder: Path, trial: Trial, lines: Sequence[Line], result: Result) -> None:
    finite = {seed: value if math.isfinite(value) else None for seed, value in result.objectives.items()}
    summary = {
        "status": "finished",
        "failed": list(result.failed),
        "final": {str(line["seed"]): line for line in lines if line["kind"] == "eval"},
        "trial": {**trial._asdict(), "objectives": finite, "reason": result.reason, "same_as": result.same_as},
    }
    write_whole(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def _copy(search: Search, study: optuna.Study, trial: Trial, original: int) -> None:
    """Gives a trial the result of an earlier one with the same values."""
    source, folder = trial_folder(search.folder, original), trial_folder(search.folder, trial.number)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    result = read_result(search.folder, original)._replace(same_as=original)
    summary = read_mapping(folder / SUMMARY_FILE)
    own = {"number": trial.number, "same_as": original}
    write_whole(folder / SUMMARY_FILE, json.dumps({**summary, "trial": {**summary["trial"], **own}}, indent=2) + "\n")
    _report(study, trial, result)


def _report(study: optuna.Study, trial: Trial, result: Result) -> None:
    """Reports a result to optuna, and prints it."""
    words = ", ".join(as_words(trial.params))
    if result.reason is not None:
        study.tell(trial.number, state=TrialState.FAIL)
        outcome = f"failed, {result.reason}"
    else:
        study.tell(trial.number, result.objective)
        outcome = f"{result.objective:.4g}"
    same = f"; the values of trial {result.same_as}" if result.same_as is not None else ""
    print(f"trial {trial.number}: {outcome} ({words}{same})", flush=True)


def trial_folder(folder: Path, number: int) -> Path:
    """Returns the folder of a trial in that of its search."""
    return folder / TRIAL_DIR / f"{number:04d}"


def read_result(folder: Path, number: int) -> Result:
    """Reads the result of a trial that has ended.

    Raises:
        ConfigError: if its ``summary.json`` is missing or damaged.
    """
    path = trial_folder(folder, number) / SUMMARY_FILE
    summary = read_mapping(path)
    try:
        own = summary["trial"]
        objectives = {int(seed): math.nan if value is None else value for seed, value in own["objectives"].items()}
        return Result(objectives, own["reason"], tuple(summary["failed"]), own["same_as"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from None


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials that have a result or failed, in their order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
