"""Searches for good values of an algorithm's options: ``python -m wqmix_jax.search +algo=NAME 'search={..}'``.

Whatever is wrong with the options is printed as one line on stderr, with exit code 2, before anything is compiled.
"""

import difflib
import functools
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from wqmix_jax.api import train_members
from wqmix_jax.cli.checks import check_overrides, refuse_incomplete, refuse_settings_of_hydra
from wqmix_jax.cli.command import command, warn_of_copied_checkout
from wqmix_jax.cli.help import with_options
from wqmix_jax.cli.overrides import compose_run, compose_search, prepare
from wqmix_jax.cli.parser import overrides_parser
from wqmix_jax.cli.syntax import Override, parse_overrides
from wqmix_jax.config import PROGRAMS, RunConfig, run_config
from wqmix_jax.envs.checks import RESERVED_METRICS, check_environment
from wqmix_jax.errors import SEEDS_FAILED, ConfigError, RunError, exit_code_of
from wqmix_jax.options import add_import_paths, checked
from wqmix_jax.records.run_dir import held, make_run_dir, new_run_dir, save_config
from wqmix_jax.runs.startup import command_to_continue
from wqmix_jax.runs.trust import Named, open_config, refuse_foreign_callbacks
from wqmix_jax.search.settings import CHANGEABLE, Origin, SearchOptions, load_search, refuse_missing_optuna, save_search
from wqmix_jax.training.devices import claim_cores, refuse_missing_backend

if TYPE_CHECKING:
    from wqmix_jax.search.trials import Search  # its import loads optuna, which may be missing

_HELP = """\
Searches for good values of an algorithm's options with optuna (extra `search`): a sampler (TPE) chooses the values of
each trial from the results of those before. Trials that differ only in options that the compiled program takes as
arguments train in one call.

  python -m wqmix_jax.search +algo=NAME 'search={lr: {low: 1e-4, high: 1e-2, log: true}}' [trials=32] [KEY=VALUE ..]
  python -m wqmix_jax.search resume=FOLDER [trials=64]

--config-dir DIR   adds the folder of your own algorithms and environments

The options of the search and their defaults; all others are those of a run, python -m wqmix_jax.train --help:

"""

OWN = tuple(SearchOptions.__dataclass_fields__)  # type: ignore[attr-defined]

_REFUSED = {
    "sweep": "search={..} chooses the values",
    "hosts": "a search trains on one host",
    "host": "a search trains on one host",
    "distributed": "a search trains on one host",
    "checkpoint": "a search writes no checkpoints; a trial that was interrupted is trained again",
    "logger": "of the loggers, a search has logger.progress alone",
}
"""Options of a run that have no effect here, and the reason."""


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    help_text = functools.partial(with_options, _HELP, SearchOptions, "search.yaml")
    args = overrides_parser("python -m wqmix_jax.search", help_text).parse_args(arguments)
    refuse_missing_optuna()
    warn_of_copied_checkout()
    texts = prepare(args.overrides)
    add_import_paths(args.config_dir)
    given = {override.key_or_group: override for override in parse_overrides(texts)}
    if "resume" in given and given["resume"].value() is not None:
        search = _resumed(given, args.config_dir)
    else:
        search = _new(texts, args.overrides, args.config_dir)
    _run(search)


def _new(texts: Sequence[str], written: Sequence[str], config_dir: str | None) -> "Search":
    """Checks the options of a new search, and makes its folder.

    Args:
        texts: the overrides, prepared for hydra.
        written: the overrides as they were given.
        config_dir: the folder of the user's yamls.

    Raises:
        ConfigError: if an option is not allowed; nothing was written then.
    """
    from wqmix_jax.search.space import make_space
    from wqmix_jax.search.trials import STUDY_FILE, Search

    parsed = list(zip(texts, parse_overrides(texts), strict=True))
    _refuse_several_values(parsed)
    run_parsed = [(text, override) for text, override in parsed if _root(override.key_or_group) not in OWN]
    _refuse_misspelt(override for _, override in run_parsed)
    run_texts = [text for text, _ in run_parsed]
    refuse_settings_of_hydra(run_texts)
    refuse_incomplete(config_dir)
    check_overrides(run_texts, config_dir)
    run = compose_run(run_texts, config_dir)
    own_texts = [text for text, override in parsed if _root(override.key_or_group) in OWN]
    chosen = checked(SearchOptions, compose_search(own_texts, config_dir), prefix="")
    _refuse_options([override for _, override in run_parsed], chosen)
    claim_cores()  # before an environment's library starts the backend
    refuse_missing_backend()
    config = run_config(run.values)
    space = make_space(run.values["algo"], chosen.search)
    _refuse_unknown_metric(config, chosen.metric)
    algo, env = run.choices["algo"], run.choices["env"]
    folder = new_run_dir(config.run_dir, algo=f"search_{algo}", env=env)
    folder = make_run_dir(folder, numbered=config.run_dir is None)
    values = {**run.values, "run_dir": str(folder)}
    kept = [text for text in written if _root(text.partition("=")[0].lstrip("+")) not in (*OWN, "run_dir", "resume")]
    search = Search(folder, chosen, config, values, space, Origin(algo, env, kept, config_dir))
    save_config(folder, values)
    save_search(folder, chosen, search.origin)
    (folder / STUDY_FILE).touch()
    return search


def _resumed(given: Mapping[str, Override], config_dir: str | None) -> "Search":
    """Opens the folder of a search.

    Raises:
        ConfigError: if it holds no search, an option was given that can't change, or it names code from elsewhere.
    """
    from wqmix_jax.search.space import make_space
    from wqmix_jax.search.trials import Search

    folder = Path(str(given["resume"].value()))
    for key, override in given.items():
        if key not in ("resume", *CHANGEABLE) or override.is_sweep_override():
            kept = "a search keeps its options, except trials and compilation_cache"
            raise ConfigError(f"{override.input_line} is not allowed with resume={folder}: {kept}")
    changes = {name: given[name].value() for name in ("trials", "compilation_cache") if name in given}
    chosen, origin = load_search(folder, {name: value for name, value in changes.items() if name in OWN})
    programs = {name: str(given[f"env.{name}"].value()) for name in PROGRAMS if f"env.{name}" in given}
    named = Named(config_dir, **programs)
    values = open_config(folder, named, option="resume")
    refuse_foreign_callbacks(folder, values["callbacks"], named)
    values |= {name: value for name, value in changes.items() if name not in OWN}
    claim_cores()
    refuse_missing_backend()
    space = make_space(values["algo"], chosen.search)
    return Search(folder, chosen, run_config(values), values, space, origin._replace(config_dir=config_dir))


def _run(search: "Search") -> None:
    """Runs the trials that are missing, and reports all.

    Raises:
        ConfigError: if the search has more trials already, or another process runs it.
        RunError: if the search had to stop, or all trials failed.
        SystemExit: if Ctrl-C ended it.
    """
    from wqmix_jax.search.report import CSV_FILE, best_first, report
    from wqmix_jax.search.trials import STUDY_FILE, ended, open_study, run_trials

    folder, chosen = search.folder, search.chosen
    hint = command_to_continue(folder, search.origin.config_dir, command="search")
    with held(folder, STUDY_FILE):
        study = open_study(folder, chosen.direction)
        if (begun := len(study.get_trials(deepcopy=False))) > chosen.trials:
            raise ConfigError(f"trials={chosen.trials} is not allowed: this search has {begun} trials already")
        save_search(folder, chosen, search.origin)  # a resumed search may have more trials
        _print_lines(_plan(search, len(ended(study))))
        try:
            run_trials(search, study, train=train_members)
        except RunError as error:
            raise RunError(f"{error}; {hint}", error.exit_code) from error
        except KeyboardInterrupt:
            print(f"interrupted; {hint}", file=sys.stderr, flush=True)
            sys.exit(exit_code_of(signal.SIGINT))
        report(folder, chosen, search.origin, study)
        if not best_first(study):
            raise RunError(f"all {chosen.trials} trials failed, see {folder / CSV_FILE}", SEEDS_FAILED)


def _plan(search: "Search", num_ended: int) -> Iterator[str]:
    """Yields the lines that are printed first."""
    from wqmix_jax.search.space import traced_names

    chosen, traced = search.chosen, traced_names(search.config.algo, search.space)
    yield f"search: {search.folder}"
    seeds = "1 seed" if search.config.num_seeds == 1 else f"{search.config.num_seeds} seeds"
    done = f", {num_ended} of them done" if num_ended else ""
    yield f"trials: {chosen.trials} of {seeds}{done}, chosen {chosen.trials_per_call} at a time"
    which = "the mean over all environment steps" if chosen.last is None else f"the mean of the last {chosen.last}"
    yield f"objective: {chosen.metric}, {which}, to {chosen.direction}"
    other = [name for name in search.space if name not in traced]
    if other:
        yield f"a separate call for each value of: {', '.join(other)}"


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _root(key: str) -> str:
    return key.split(".")[0]


def _refuse_several_values(parsed: Sequence[tuple[str, Override]]) -> None:
    for _, override in parsed:
        if override.is_sweep_override() and _root(override.key_or_group) in OWN:
            raise ConfigError(f"{override.input_line} is not allowed: one value is needed, and a list is written [A,B]")


def _refuse_misspelt(overrides: Iterable[Override]) -> None:
    """Refuses an option that is unknown in a run and similar to one of a search."""
    known = (*RunConfig.__dataclass_fields__, "preset", "hydra")  # type: ignore[attr-defined]
    for override in overrides:
        root = _root(override.key_or_group)
        if root not in known and not difflib.get_close_matches(root, known, n=1):
            for close in difflib.get_close_matches(root, OWN, n=1):
                raise ConfigError(f"{root} is unknown: did you mean {close}?")


def _refuse_options(overrides: Sequence[Override], chosen: SearchOptions) -> None:
    """Refuses options of a run that have no effect in this search."""
    for override in overrides:
        key = override.key_or_group
        if key == "logger.progress":
            continue
        if (reason := _REFUSED.get(_root(key))) is not None:
            raise ConfigError(f"{override.input_line} is not allowed: {reason}")
        if key.removeprefix("algo.") in chosen.search and key.startswith("algo."):
            name = key.removeprefix("algo.")
            raise ConfigError(f"{override.input_line} is not allowed: search.{name} chooses its values")


def _refuse_unknown_metric(config: RunConfig, metric: str) -> None:
    """Refuses a metric that the evaluations don't have; callbacks may add any."""
    check_environment(config.env)
    env = config.env
    own: dict[str, Any] = jax.eval_shape(lambda key: env.metrics(env.reset(key)), jax.random.key(0))
    known = [*(name for name in RESERVED_METRICS if name.startswith("episode_")), *own]
    if metric not in known and not config.callbacks:
        raise ConfigError(f"metric={metric} is not allowed: choose one of {', '.join(known)}")


if __name__ == "__main__":
    main()
